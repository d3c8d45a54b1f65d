# Everything that a fresh machine needs is Python 3.11 (or newer) and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: quickstart test test-all soak check format generated docs bench clean

quickstart: $(VENV)/.installed
	$(BIN)/shortstack quickstart --force

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -m "not slow and not gpu" -n 2 --dist loadfile

test-all: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

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
