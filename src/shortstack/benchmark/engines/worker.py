"""Greedy tokens from an engine's own Python: a worker there answers lines of JSON (`foreign/worker.py`)."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from shortstack.benchmark.engines import EngineError, Workload
from shortstack.benchmark.engines.program import Conversation, environment, found_program
from shortstack.benchmark.options import EngineOptions
from shortstack.errors import UsageError
from shortstack.evaluation.evaluated_model import Subject

FOLDER = "SHORTSTACK_ENGINES"  # names the folder that `make engines` fills, with an environment for each engine
_SCRIPT = Path(__file__).parent / "foreign" / "worker.py"
_LINE, _QUOTED = 300, 120
_PYTHON = ("python", "python3")
_SHORTEST, _LONGEST = 256, 1024  # tokens that an engine is given room for, where the model has as many positions
_PACKAGES = {
    "transformers": "pip install torch transformers",
    "mlx": "pip install 'mlx[cpu]' mlx-lm (on a Mac: mlx-lm)",
    "openvino": "pip install openvino-genai openvino-tokenizers 'optimum-intel[openvino]'",
}


def installed_python(engine: str) -> Path | None:
    """The Python of an engine's environment in the folder that SHORTSTACK_ENGINES names; None where it is not there."""
    folder = os.environ.get(FOLDER)
    path = Path(folder).expanduser() / engine / "bin" / "python" if folder else None
    return path.absolute() if path is not None and os.access(path, os.X_OK) else None


def threads() -> int | None:
    """How many threads an engine is to use, where OMP_NUM_THREADS says it."""
    stated = os.environ.get("OMP_NUM_THREADS", "")
    return int(stated) if stated.isdigit() and int(stated) else None


class Worker:
    """A worker that has loaded one checkpoint.

    Attributes:
        version: of the engine.
        url: where its server listens, of an engine that is one.
    """

    def __init__(
        self, engine: str, python: Path, model: Path, *, dtype: str, length: int, limit: float, env: dict[str, str]
    ) -> None:
        """Start it and wait until the checkpoint is loaded.

        Args:
            engine: its name in the worker's table.
            python: of the engine's environment.
            model: a checkpoint directory, or a GGUF file.
            dtype: what to compute in.
            length: tokens that the longest sequence will have.
            limit: seconds that loading, and each answer, may take.
            env: the environment of its process.

        Raises:
            EngineError: it cannot be loaded there.
        """
        self._talk = Conversation([python, _SCRIPT], what=engine, limit=limit, env=env)
        request = {
            "engine": engine, "model": str(model), "dtype": dtype, "length": length, "threads": threads(),
        }  # fmt: skip
        self._engine = engine
        answer = self._asked(request)
        self.version, self.url = str(answer.get("version", "")), str(answer.get("url", ""))

    def greedy(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """The most likely continuation of each prompt.

        Raises:
            EngineError: it did not give them.
        """
        answer = self._asked({"prompts": [list(prompt) for prompt in prompts], "new_tokens": new_tokens})
        tokens = answer.get("tokens")
        if not isinstance(tokens, list) or [_length(row) for row in tokens] != [new_tokens] * len(prompts):
            raise EngineError(
                f"{self._engine}: expected {len(prompts)} rows of {new_tokens} tokens, found {str(answer)[:120]}"
            )
        return tokens

    def close(self) -> None:
        """End it."""
        self._talk.close()

    def _asked(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._talk.ask(request)
        except EngineError as error:
            self._talk.close()
            raise _in_words(self._engine, error, self._talk.log) from None


class WorkerEngine:
    """One checkpoint in an engine that gives greedy tokens, and is not timed."""

    in_process = False

    def __init__(self, subject: Subject, options: EngineOptions, name: str) -> None:
        self.name, self._subject, self._options = name, subject, options
        self.version = ""
        self.precision = subject.settings["dtype"]
        self.notes: list[str] = []
        self.peak_rss_bytes: int | None = None
        self._worker: Worker | None = None

    def find(self) -> None:
        """Look for its Python."""
        self._python()

    def start(self) -> None:
        """It is started by the first call."""

    def greedy(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """By its Python, in a process that stays until `stop`."""
        if self._worker is None:
            self._worker = Worker(
                self.name, self._python(), self._subject.checkpoint.directory, dtype=self.precision,
                length=length_of(self._subject, prompts, new_tokens), limit=self._options.time_limit, env=environment(),
            )  # fmt: skip
            self.version = self._worker.version
        return self._worker.greedy(prompts, new_tokens)

    def tokenize(self, texts: Sequence[str]) -> None:
        """It has the checkpoint's tokenizer."""

    def bench(self, workload: Workload, *, runs: int, warmup: int) -> NoReturn:
        """It is not timed."""
        raise EngineError(f"{self.name} is not timed here")

    def served_rate(self, workload: Workload) -> float | None:
        """It has no measure of its own."""

    def stop(self) -> None:
        """End its process."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _python(self) -> Path:
        hint = f"{_PACKAGES[self.name]} in an environment of its own, then --engine-python VENV/bin/python"
        if self._options.engine_python is not None:
            return found_program(self._options.engine_python, _PYTHON, f"the Python of {self.name}", hint)
        found = installed_python(self.name)
        if found is None:
            raise UsageError(f"{self.name} was not found: it is a Python package, and no Python is named", hint=hint)
        return found


def length_of(subject: Subject, prompts: Sequence[Sequence[int]], new_tokens: int) -> int:
    """Tokens that an engine is given room for: some more than are needed now, as far as the model has positions."""
    needed = max(map(len, prompts)) + new_tokens
    positions = subject.checkpoint.positions or _SHORTEST
    return max(needed, min(positions, _LONGEST))


def _length(row: Any) -> int:
    """Of a row of tokens; -1 for anything else."""
    return len(row) if isinstance(row, list) and all(type(token) is int for token in row) else -1


# What an engine says -> (what is wrong, the next step). The first that fits counts.
_KNOWN: tuple[tuple[str, str, str, str], ...] = (
    (
        "vllm",
        "no attribute 'cpu_gemm_wna16'",
        "its kernels for weights of 4 bits need a processor with AVX-512, which this one lacks",
        "serve it with transformers, or serve the checkpoint from before it was quantized",
    ),
    (
        "mlx",
        "parameters not in model",
        "it does not know weights of these names; they may be quantized in a way that mlx-lm does not support",
        "the checkpoint from before it was quantized, or another engine",
    ),
    ("", "No module named", "something is not installed in that environment", "install it there, or name another one"),
)
_CAUSE = re.compile(r"\] (\w*(?:Error|Exception)\w*: .+)")  # in a log line of vLLM's other processes


def _in_words(engine: str, error: EngineError, log: str) -> EngineError:
    """What is known about a failure; else, where the engine points to its log for the cause, that."""
    lines = [error.message, *log.splitlines()]
    for of, sign, wrong, hint in _KNOWN:
        found = next((line for line in lines if sign in line), None)
        if found is not None and of in ("", engine):
            said = " ".join(found.removeprefix(f"{engine}: ").split())
            begin = max(0, said.index(sign) - _QUOTED // 2)
            return EngineError(f"{engine}: {wrong} ({said[begin : begin + _QUOTED]})", hint=hint)
    cause = next((match[1] for line in lines[1:] if (match := _CAUSE.search(line))), None)
    if cause is not None and "root cause" in error.message:
        return EngineError(f"{engine}: {cause[:_LINE]}", hint=error.hint)
    return error
