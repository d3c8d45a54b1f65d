"""What tests of measuring share: models under measurement, workloads, engines that measure nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from shortstack.artifacts.results import Result
from shortstack.benchmark import memory, sweep
from shortstack.benchmark.engines import DoesNotFitError, Sample, Workload
from shortstack.benchmark.options import EngineOptions
from shortstack.common.progress import Progress
from shortstack.evaluation.evaluated_model import Subject
from shortstack.evaluation.options import EvaluationOptions
from shortstack.families.open_model import open_model

FEW = {"runs": 4, "warmup": 1, "new_tokens": "4", "prompt_tokens": 8, "quiet": True}
QUIET = Progress(quiet=True)


def subject(path: Path) -> Subject:
    return Subject(open_model(str(path), progress=QUIET), EvaluationOptions(device="cpu", quiet=True), QUIET)


def by_model(results: tuple[Result, ...]) -> dict[str, Result]:
    return {Path(result.model).name: result for result in results}


def workload(batch: int = 1, prompt: int = 8, new: int = 4) -> Workload:
    return Workload(batch, tuple(range(3, 3 + prompt)), new, prompt=f"a prompt of {prompt} tokens")


def measure_memory_here(patch: pytest.MonkeyPatch) -> None:
    """Measure peak memory in this process, as the process that is started for it does: tests/benchmark/test_memory.py starts
    that one. The figures hold what the tests hold themselves."""

    def measured(
        one: Subject, engine: str, workloads: Sequence[Workload], keep: Callable[[Workload, dict[str, Any]], object]
    ) -> None:
        measure = memory._loaded(memory._request(one, engine))
        for each in workloads:
            keep(each, {**measure.load, **measure.taken(each)})

    patch.setattr(sweep, "measured_memory", measured)


class CountedEngine:
    """Takes as long as its model has blocks, in tenths of a second that nobody waits for; `log` says who ran what."""

    name, version, in_process = "transformers", "counted", True

    def __init__(
        self,
        one: Subject,
        log: list[tuple[str, int, int, int]],
        fits: Callable[[str, int], bool],
        precision: str = "float32",
    ) -> None:
        self.precision = precision
        self._subject, self._log, self._fits = one, log, fits
        self.notes: list[str] = []
        self.peak_rss_bytes: int | None = None

    def find(self) -> None:
        pass

    def start(self) -> None:
        pass

    def tokenize(self, texts: Sequence[str]) -> None:
        pass

    def stop(self) -> None:
        self._log.append((Path(self._subject.name).name, -1, 0, 0))

    def greedy(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        raise NotImplementedError

    def served_rate(self, workload: Workload) -> float | None:
        return None

    def bench(self, workload: Workload, *, runs: int, warmup: int) -> list[Sample]:
        name = Path(self._subject.name).name
        if not self._fits(name, workload.batch):
            raise DoesNotFitError(f"{name}: out of memory at batch {workload.batch}")
        self._log.append((name, workload.batch, runs, warmup))
        blocks = self._subject.checkpoint.depth
        before = sum(1 for entry in self._log if entry[:2] == (name, workload.batch))
        drift = 1 + 0.01 * before  # the machine gets slower: pairs do not
        return [
            Sample(0.1 * blocks * drift, 0.02 * blocks * drift, 0.08 * blocks * drift, workload.new_tokens - 1)
        ] * runs


def counted(
    log: list[tuple[str, int, int, int]],
    fits: Callable[[str, int], bool] = lambda name, batch: True,
    precision: str = "float32",
) -> Callable[[str, Subject, EngineOptions], CountedEngine]:
    """What takes the place of `open_engine`."""
    return lambda name, one, options: CountedEngine(one, log, fits, precision)
