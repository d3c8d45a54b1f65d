"""Engines that run a checkpoint, behind one small interface: find, greedy, start, bench, stop. A row each.

`bench` times them, `check` compares their tokens with those of transformers.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from shortstack.benchmark.options import EngineOptions, Sampling
from shortstack.errors import ShortstackError, UsageError, did_you_mean
from shortstack.evaluation.evaluated_model import Subject


class EngineError(ShortstackError):
    """An engine is not there, is too old, hangs, dies, or gives a wrong answer."""


class DoesNotFitError(ShortstackError):
    """There is not enough memory for a batch: a row of the table, not the end of the run."""


@dataclass(frozen=True)
class Workload:
    """One configuration that is timed.

    Attributes:
        batch: sequences at a time.
        prompt_ids: the prompt, which every sequence of the batch begins with.
        new_tokens: tokens that each sequence gets.
        sampling, seed: how they are chosen.
        prompt: what the prompt is, in words.
    """

    batch: int
    prompt_ids: tuple[int, ...]
    new_tokens: int
    sampling: Sampling = "greedy"
    seed: int = 1234
    prompt: str = ""

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.prompt_ids)

    @property
    def label(self) -> str:
        """What was run, in words; the same for models of different tokenizers."""
        return f"batch {self.batch}, {self.prompt}, {self.new_tokens} new tokens"


@dataclass(frozen=True)
class Sample:
    """One run of a workload.

    Attributes:
        seconds: wall-clock, of the whole run.
        prefill_seconds: until the first new token is there.
        decode_seconds: of all further ones.
        steps: further tokens of each sequence.
        device_seconds: of the whole run by the device's own events; None where it has none.
    """

    seconds: float
    prefill_seconds: float
    decode_seconds: float
    steps: int
    device_seconds: float | None = None


class Engine(Protocol):
    """What runs one checkpoint.

    Attributes:
        name: as `--engine` has it.
        in_process: it runs in this process, ready between calls: several models can take turns run by run.
        version: of the engine, once it has started or given tokens.
        precision: what it computes in, or stores weights in, such as `float32` or `Q8_0`.
        notes: what a reader of its figures should know.
        peak_rss_bytes: of the engine's own processes in its last `bench`; None where that is not known.
    """

    name: str
    in_process: bool
    version: str
    precision: str
    notes: list[str]
    peak_rss_bytes: int | None

    def find(self) -> None:
        """Look for it; nothing is loaded, and nothing is run.

        Raises:
            UsageError: it is not there.
        """

    def start(self) -> None:
        """Load the checkpoint, as far as that is needed before the first `bench`.

        Raises:
            EngineError: the engine is not there, or cannot load it.
        """

    def greedy(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """The most likely continuation of each prompt, so many tokens of it, end of text or not.

        Raises:
            EngineError: it did not give them.
        """

    def tokenize(self, texts: Sequence[str]) -> list[list[int]] | None:
        """Ids of texts by the engine's own tokenizer; None where it has none but the checkpoint's."""

    def bench(self, workload: Workload, *, runs: int, warmup: int) -> list[Sample]:
        """Time some runs, after others that are not counted.

        Raises:
            DoesNotFitError: there is not enough memory for it.
            EngineError: it did not end well.
        """

    def served_rate(self, workload: Workload) -> float | None:
        """New tokens per second where many requests of this shape wait; None where the engine has no measure of its own."""

    def stop(self) -> None:
        """Let go of memory and processes; a stopped engine can be started again."""


@dataclass(frozen=True)
class EngineRow:
    """One engine that is known.

    Attributes:
        adapter: module:class, called with the checkpoint and the options.
        summary: what it is.
        arguments: further ones for the class.
        measured: `bench` can time it.
        checked: `check` can compare its tokens.
    """

    adapter: str
    summary: str
    arguments: tuple[Any, ...] = ()
    measured: bool = True
    checked: bool = True


_HERE = "shortstack.benchmark.engines"
ENGINES: dict[str, EngineRow] = {
    "transformers": EngineRow(f"{_HERE}.transformers:TransformersEngine", "transformers, eager"),
    "compiled": EngineRow(
        f"{_HERE}.transformers:TransformersEngine", "transformers, compiled, static cache", (True,), checked=False
    ),
    "vllm": EngineRow(f"{_HERE}.vllm:VllmEngine", "vLLM, by its own `vllm bench latency`"),
    "llama.cpp": EngineRow(f"{_HERE}.llama_cpp:LlamaCppEngine", "llama.cpp, by its own llama-bench, or its server"),
    "mlx": EngineRow(f"{_HERE}.worker:WorkerEngine", "MLX, by mlx-lm", ("mlx",), measured=False),
    "openvino": EngineRow(f"{_HERE}.worker:WorkerEngine", "OpenVINO GenAI", ("openvino",), measured=False),
}


def engine_names(text: str, known: Iterable[str]) -> list[str]:
    """`transformers,vllm` -> names of rows.

    Args:
        text: as it is given.
        known: the names that are allowed.

    Raises:
        UsageError: one is not known.
    """
    allowed = list(known)
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in allowed:
            raise UsageError(f"--engine {name}: unknown", hint=did_you_mean(name, allowed))
    if not names or len(set(names)) < len(names):
        raise UsageError(f"--engine {text!r}: expected names separated by commas, each once")
    return names


def measured_engines(text: str) -> list[str]:
    """Names of engines that `bench` can time.

    Raises:
        UsageError: one is not known.
    """
    return engine_names(text, (name for name, row in ENGINES.items() if row.measured))


def open_engine(name: str, subject: Subject, options: EngineOptions, **more: Any) -> Engine:
    """The adapter of an engine for one checkpoint, not started yet; `more` is what only this adapter takes."""
    module, _, adapter = ENGINES[name].adapter.partition(":")
    engine: Engine = getattr(importlib.import_module(module), adapter)(
        subject, options, *ENGINES[name].arguments, **more
    )
    return engine
