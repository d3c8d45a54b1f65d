"""Peak memory and utilisation, in a process of its own for each model: nothing that was measured before is in it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from shortstack.benchmark.engines import DoesNotFitError, EngineError, Workload, open_engine
from shortstack.benchmark.engines.program import Conversation
from shortstack.benchmark.options import EngineOptions
from shortstack.benchmark.utilisation import INTERVAL_SECONDS
from shortstack.evaluation.evaluated_model import Subject

_LIMIT_SECONDS = 24 * 3600.0  # a run at batch 256 may take long; the user's --time-limit is for programs of others
_FEWEST_READINGS = 3
_COMMAND = [sys.executable, "-m", "shortstack.benchmark.memory"]
NO_MEMORY = "no memory"


def measured_memory(
    subject: Subject, engine: str, workloads: Sequence[Workload], keep: Callable[[Workload, dict[str, Any]], object]
) -> None:
    """Run every workload once, alone, and give `keep` what that took.

    What is given: `load_peak_bytes`, `peak_rss_bytes`, `peak_device_bytes` (None on a CPU) and `readings` of the sampler; or
    `no memory` with the reason, where it did not fit or the system ended the process for it.

    Args:
        subject: the model; it is loaded in the other process.
        engine: transformers or compiled.
        workloads: in rising order of what they need.
        keep: called with each workload as soon as it is measured.

    Raises:
        EngineError: the process failed in another way.
    """
    left = list(workloads)
    while left:
        child = _Child(subject, engine)
        try:
            while left:
                keep(left[0], child.measured(left[0]))
                left.pop(0)
                if child.has_ended:
                    break
        finally:
            child.close()


class _Child:
    def __init__(self, subject: Subject, engine: str) -> None:
        self._name = subject.name
        self._talk = Conversation(
            _COMMAND,
            what=f"{subject.name}: peak memory",
            limit=_LIMIT_SECONDS,
            env=dict(os.environ),
        )
        self._talk.tell({**_request(subject, engine), "path": sys.path})
        self._load: dict[str, Any] | None = None
        self.has_ended = False

    def measured(self, workload: Workload) -> dict[str, Any]:
        try:
            if self._load is None:
                self._load = self._talk.answer()
            found = self._talk.ask(asdict(workload))
        except EngineError:
            if self._talk.exit_code != -9:
                raise
            self.has_ended = True  # what Linux does to a process that takes the last memory
            return {NO_MEMORY: "the system ended the process (signal 9), as it does where memory runs out"}
        return {**self._load, **found}

    def close(self) -> None:
        self._talk.close()


def _request(subject: Subject, engine: str) -> dict[str, Any]:
    """What the other process needs to load the same model in the same way."""
    options = subject.options
    return {
        "model": subject.name, "engine": engine, "dtype": subject.settings["dtype"], "device": str(subject.place),
        "trust_remote_code": options.trust_remote_code, "allow_links": options.allow_links, "interval": INTERVAL_SECONDS,
    }  # fmt: skip


def main() -> None:
    """The other process: answers workloads with what they took, until its input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    request = json.loads(sys.stdin.readline())
    sys.path[:] = request.pop("path")
    try:
        measure = _loaded(request)
        print(json.dumps(measure.load), file=answers, flush=True)
        for line in sys.stdin:
            record = json.loads(line)
            workload = Workload(**{**record, "prompt_ids": tuple(record["prompt_ids"])})
            print(json.dumps(measure.taken(workload)), file=answers, flush=True)
    except Exception as error:  # whatever it is, it is told there
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers, flush=True)


class _Measure:
    def __init__(self, subject: Subject, engine: Any, load: dict[str, Any], interval: float) -> None:
        self._subject, self._engine, self.load, self._interval = subject, engine, load, interval

    def taken(self, workload: Workload) -> dict[str, Any]:
        from shortstack.benchmark.utilisation import Sampler, reader
        from shortstack.runtime.memory import return_free_memory, used

        return_free_memory()
        try:
            with used(self._subject.place) as usage:
                self._engine.bench(workload, runs=1, warmup=0)
            with Sampler(reader(self._subject.place), self._interval) as sampler:
                while len(sampler.readings) < _FEWEST_READINGS:
                    self._engine.bench(workload, runs=1, warmup=0)
        except DoesNotFitError as error:
            return {NO_MEMORY: error.message}
        return {
            "peak_rss_bytes": usage.peak_rss_bytes, "peak_device_bytes": usage.peak_device_bytes,
            "readings": sampler.readings,
        }  # fmt: skip


def _loaded(request: dict[str, Any]) -> _Measure:
    from shortstack.common.progress import Progress
    from shortstack.evaluation.options import EvaluationOptions
    from shortstack.families.open_model import open_model
    from shortstack.runtime.memory import used

    progress = Progress(quiet=True)
    options = EvaluationOptions(
        dtype=request["dtype"], device=request["device"], trust_remote_code=request["trust_remote_code"],
        allow_links=request["allow_links"], quiet=True,
    )  # fmt: skip
    checkpoint = open_model(request["model"], allow_links=options.allow_links, progress=progress)
    subject = Subject(checkpoint, options, progress)
    engine = open_engine(request["engine"], subject, EngineOptions())
    with used(subject.place) as usage:
        engine.start()
    return _Measure(subject, engine, {"load_peak_bytes": usage.peak_rss_bytes}, request["interval"])


if __name__ == "__main__":
    main()
