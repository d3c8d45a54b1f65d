"""The sweep: every model, engine and configuration, models in turns, each finding kept until all are there.

A sweep that was interrupted resumes: what it has measured is kept under everything that it depends on, and forgotten when
the results are written. A second run measures again.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from shortstack.artifacts.provenance import versions
from shortstack.benchmark.engines import DoesNotFitError, Engine, EngineError, Sample, Workload, open_engine
from shortstack.benchmark.floors import Machine, measured_machine
from shortstack.benchmark.memory import NO_MEMORY, measured_memory
from shortstack.benchmark.options import EngineOptions, Sweep
from shortstack.benchmark.work import Work
from shortstack.common.formatting import size
from shortstack.common.progress import Progress
from shortstack.evaluation.evaluated_model import Subject
from shortstack.runtime.memory import available_bytes
from shortstack.runtime.workspace import cache, cached, forget

_SHARE_OF_MEMORY = 0.6  # that the weights of all models may take, for them to take turns run by run
_TURNS_OF_PROGRAMS = 2  # A B, B A: an engine that loads the model for every call


@dataclass
class Measured:
    """What was measured of one model, in one engine and configuration.

    Attributes:
        samples: a run each; empty where it does not fit.
        does_not_fit: why, where it does not.
        memory: what its run in a process of its own took; empty where that was not measured.
        machine: what the machine reached in the same minutes.
        served_rate: new tokens per second where many requests wait, by the engine's own measure.
        version, notes, precision: of the engine.
    """

    subject: Subject
    engine: str
    workload: Workload
    samples: list[Sample] = field(default_factory=list)
    does_not_fit: str = ""
    memory: dict[str, Any] = field(default_factory=dict)
    machine: Machine | None = None
    served_rate: float | None = None
    version: str = ""
    notes: list[str] = field(default_factory=list)
    precision: str = ""

    @property
    def work(self) -> Work:
        """What it must do at least, in the type that the engine holds the weights in."""
        return Work.stored(self.subject.checkpoint, self.precision or self.subject.settings["dtype"])


class SweepRun:
    """One sweep over some models."""

    def __init__(
        self, subjects: Sequence[Subject], workloads: Sequence[Sequence[Workload]], sweep: Sweep, engines: EngineOptions
    ) -> None:
        """What is to be run.

        Args:
            subjects: the models.
            workloads: of each model, in one order: they differ in the prompt's tokens alone.
            sweep: how often.
            engines: where engines are.
        """
        self._subjects, self._workloads, self._sweep, self._engines = subjects, workloads, sweep, engines
        self._progress: Progress = subjects[0].progress
        self._keys: list[dict[str, Any]] = []

    def measured(self, engine: str, *, memory: bool) -> list[Measured]:
        """Every model in every configuration, in one engine.

        Raises:
            EngineError: the engine is not there, or fails.
        """
        found = [
            [Measured(subject, engine, workload) for subject, workload in zip(self._subjects, row, strict=True)]
            for row in zip(*self._workloads, strict=True)
        ]
        for row in found:
            for one in row:
                one.does_not_fit = _too_much(one) if self._in_process(engine) else ""
        if memory:
            self._measure_memory(engine, [one for row in found for one in row])
        for group in self._groups(engine):
            self._time(engine, [[row[at] for at in group] for row in found])
        return [one for row in found for one in row]

    def forget(self) -> None:
        """Everything is written: nothing needs to be kept."""
        for key in self._keys:
            forget(key)

    def _measure_memory(self, engine: str, found: Sequence[Measured]) -> None:
        """Before anything is loaded here; external engines are watched while they are timed."""
        for subject in self._subjects:
            own = [one for one in found if one.subject is subject and not one.does_not_fit]
            missing = []
            for one in own if self._in_process(engine) else ():
                known = self._kept(self._key("memory", engine, [one]))
                if known is None:
                    missing.append(one)
                else:
                    one.memory = known
            by_workload = {one.workload: one for one in missing}

            def keep_one(
                workload: Workload, taken: dict[str, Any], by_workload: dict[Workload, Measured] = by_workload
            ) -> None:
                by_workload[workload].memory = taken
                cache(self._key("memory", engine, [by_workload[workload]]), taken)

            if missing:
                self._progress.say(f"{subject.name}: measuring peak memory and utilisation in a separate process ...")
                try:
                    measured_memory(subject, engine, list(by_workload), keep_one)
                except EngineError as error:
                    for one in missing:
                        one.notes.append(f"peak memory is not known: {error.message}")
            for one in own:
                one.does_not_fit = one.memory.get(NO_MEMORY, "")

    def _in_process(self, engine: str) -> bool:
        return open_engine(engine, self._subjects[0], self._engines).in_process

    def _groups(self, engine: str) -> list[list[int]]:
        """Which models take turns: all, or each alone where they do not fit into memory together."""
        everyone = list(range(len(self._subjects)))
        first = self._subjects[0]
        if len(everyone) == 1 or not self._in_process(engine):
            return [everyone]
        needed = sum(one.checkpoint.parameters() * one.dtype.itemsize for one in self._subjects)
        if needed <= _SHARE_OF_MEMORY * available_bytes(first.place):
            return [everyone]
        self._progress.say(
            f"{len(everyone)} models need {size(needed)} together, so they are measured one after another, not in turns"
        )
        return [[at] for at in everyone]

    def _time(self, name: str, rows: Sequence[Sequence[Measured]]) -> None:
        """Time some models, which take turns, in every configuration."""
        engines = [open_engine(name, one.subject, self._engines) for one in rows[0]]
        started = False
        try:
            for row in rows:
                key = self._key("times", name, row)
                known = self._kept(key)
                if known is None:
                    if not started:
                        for engine in engines:
                            engine.start()
                        started = True
                    self._progress.say(f"{name}, {row[0].workload.label} ...")
                    known = self._timed(engines, row)
                    self._time_alone(engines, row, known)
                    cache(key, known)
                _fill_in(row, known)
        finally:
            for engine in engines:
                engine.stop()

    def _time_alone(self, engines: Sequence[Engine], row: Sequence[Measured], known: dict[str, Any]) -> None:
        """What did not fit beside the other models is tried again without them in memory."""
        if len(row) == 1 or not engines[0].in_process:
            return
        for at, one in enumerate(row):
            if known["does_not_fit"][at] and not one.does_not_fit:
                for engine in engines:
                    engine.stop()  # they load again when they are called
                alone = self._timed([engines[at]], [one])
                for name, values in alone.items():
                    known[name][at] = values[0]
                known["notes"][at] = [
                    *known["notes"][at],
                    f"{one.subject.name} was measured alone at {one.workload.label}",
                ]

    def _timed(self, engines: Sequence[Engine], row: Sequence[Measured]) -> dict[str, Any]:
        taking_part = [at for at, one in enumerate(row) if not one.does_not_fit]
        machines = [_machine(row[at].subject) for at in taking_part]
        samples: list[list[Sample]] = [[] for _ in row]
        reasons = [one.does_not_fit for one in row]
        runs, warmup = self._sweep.runs, self._sweep.warmup
        in_process = engines[0].in_process
        if in_process:
            for at in list(taking_part):
                self._call(engines[at], row[at], 0, warmup, reasons, at)
        turns = runs if in_process else min(_TURNS_OF_PROGRAMS, runs)
        with self._progress.bar("runs", turns * len(taking_part)) as advance:
            for turn in range(turns):
                share = runs * (turn + 1) // turns - runs * turn // turns
                for at in taking_part if turn % 2 == 0 else reversed(taking_part):
                    before = 0 if in_process else warmup
                    samples[at] += self._call(engines[at], row[at], share, before, reasons, at)
                    advance(1)
        after = [_machine(row[at].subject) for at in taking_part]
        notes = [list(engine.notes) for engine in engines]
        served = [
            self._served(engines[at], one, reasons[at], notes[at]) if at in taking_part else None
            for at, one in enumerate(row)
        ]
        best = {at: one.best_of(two) for at, one, two in zip(taking_part, machines, after, strict=True)}
        return {
            "samples": [
                [] if reason else [asdict(sample) for sample in own]
                for own, reason in zip(samples, reasons, strict=True)
            ],
            "does_not_fit": reasons,
            "machines": [asdict(best[at]) if at in best else None for at in range(len(row))],
            "versions": [engine.version for engine in engines],
            "notes": notes,
            "precisions": [engine.precision for engine in engines],
            "served": served,
            "peaks": [engine.peak_rss_bytes for engine in engines],
        }  # fmt: skip

    def _call(self, engine: Engine, one: Measured, runs: int, warmup: int, reasons: list[str], at: int) -> list[Sample]:
        if reasons[at]:
            return []
        try:
            return engine.bench(one.workload, runs=runs, warmup=warmup)
        except DoesNotFitError as error:
            reasons[at] = error.message
            return []

    def _served(self, engine: Engine, one: Measured, reason: str, notes: list[str]) -> float | None:
        """Where this measure fails, the times that were taken before stand."""
        try:
            return None if reason else engine.served_rate(one.workload)
        except DoesNotFitError:
            return None
        except EngineError as error:
            notes.append(f"served_rate is not known: {error.message}")
            return None

    def _key(self, what: str, engine: str, row: Sequence[Measured]) -> dict[str, Any]:
        """Everything that a finding depends on; the machine too, and all models that took turns."""
        key = {
            "what": f"bench {what}", "engine": engine, "models": [one.subject.identity() for one in row],
            "workloads": [asdict(one.workload) for one in row], "settings": [one.subject.settings for one in row],
            "runs": [self._sweep.runs, self._sweep.warmup], "options": {k: str(v) for k, v in asdict(self._engines).items()},
            "versions": versions(), "machine": [platform.node(), platform.machine()],
        }  # fmt: skip
        self._keys.append(key)
        return key

    def _kept(self, key: dict[str, Any]) -> dict[str, Any] | None:
        found = None if self._subjects[0].options.fresh else cached(key)
        if found is not None:
            self._progress.say("resumed: measured before the interruption (--fresh measures it again)")
        return found


def _fill_in(row: Sequence[Measured], known: dict[str, Any]) -> None:
    for at, one in enumerate(row):
        one.samples = [Sample(**sample) for sample in known["samples"][at]]
        one.does_not_fit = known["does_not_fit"][at]
        machine = known["machines"][at]
        one.machine = Machine(**machine) if machine is not None else None
        one.served_rate = known["served"][at]
        one.version, one.notes = known["versions"][at], [*one.notes, *known["notes"][at]]
        one.precision = known["precisions"][at]
        if known["peaks"][at] is not None:
            one.memory = {"peak_rss_bytes": known["peaks"][at], "peak_device_bytes": None, "readings": []}


def _machine(subject: Subject) -> Machine:
    work = Work.of(subject.checkpoint, subject.dtype.itemsize)
    return measured_machine(subject.place, subject.dtype, work.weight_bytes)


def _too_much(one: Measured) -> str:
    """Why a configuration is not even tried on a CPU, where running out of memory would end more than this process."""
    subject = one.subject
    if subject.place.type != "cpu":
        return ""
    work = Work.of(subject.checkpoint, subject.dtype.itemsize)
    needed, free = round(work.held_bytes(one.workload, subject.checkpoint.parameters())), available_bytes(subject.place)
    return f"it needs {size(needed)} at least, {size(free)} are free" if needed > free else ""
