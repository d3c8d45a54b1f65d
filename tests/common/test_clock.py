"""Seconds in results are those of the whole command: every command takes them from one clock."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import shortstack.common.clock as clock
from shortstack.artifacts.results import Results, load_results
from shortstack.common.options import stage
from shortstack.pruning.prune import prune
from shortstack.registry import COMMANDS

Built = Callable[..., Path]
TAKEN = 4321.0


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on which every command takes the same time, counted from its call."""

    def now() -> float:
        is_within = clock._began.get(None) is not None
        return 1000.0 + TAKEN * is_within

    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=now))


@stage
def inner() -> float:
    """A stage."""
    return clock.command_seconds()


@stage
def outer() -> tuple[float, float]:
    """A stage that calls another."""
    return inner(), clock.command_seconds()


def test_a_stage_within_a_stage_has_a_time_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([10.0, 25.0, 27.0, 40.0, 50.0])
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert outer() == (2.0, 30.0)
    with pytest.raises(LookupError):
        clock.command_seconds()


def reports_seconds(result: Any) -> bool:
    if not dataclasses.is_dataclass(result):
        return False
    return issubclass(result, Results) or "seconds" in {field.name for field in dataclasses.fields(result)}  # type: ignore[arg-type]


REPORTING = {
    name
    for name, command in COMMANDS.items()
    if any(
        reports_seconds(kind)
        for hint in [typing.get_type_hints(inspect.unwrap(command.stage))["return"]]
        for kind in (typing.get_args(hint) or [hint])
    )
}
TEXT = "some words of a text that is long enough for a few windows. " * 40
RUN: dict[str, Callable[[str, Path], Any]] = {
    "score": lambda model, at: COMMANDS["score"].stage(
        model, data=str(at / "t.txt"), samples=2, seq_len=16, out=at / "s.json", quiet=True
    ),
    "prune": lambda model, at: COMMANDS["prune"].stage(model, blocks="1", out=at / "p", quiet=True),
    "prune-width": lambda model, at: COMMANDS["prune-width"].stage(
        model, ratio=0.2, data=str(at / "t.txt"), samples=2, seq_len=16, out=at / "w", quiet=True
    ),
    "repair": lambda model, at: COMMANDS["repair"].stage(
        str(prune(model, blocks="1", out=at / "pruned", quiet=True).out),
        of=model,
        data=str(at / "t.txt"),
        samples=2,
        seq_len=16,
        out=at / "repaired",
        quiet=True,
    ),
    "retrain cpt": lambda model, at: COMMANDS["retrain cpt"].stage(
        model,
        data=str(at / "t.txt"),
        seq_len=16,
        batch=1,
        micro_batch=1,
        max_steps=1,
        validation=0,
        out=at / "c",
        quiet=True,
    ),
    "teach": lambda model, at: COMMANDS["teach"].stage(
        model, data=str(at / "t.txt"), seq_len=16, top_k=4, validation=1, out=at / "n", quiet=True
    ),
    "eval ppl": lambda model, at: COMMANDS["eval ppl"].stage(
        model, data=str(at / "t.txt"), seq_len="16", out=at / "r.json", quiet=True
    ),
    "eval samples": lambda model, at: COMMANDS["eval samples"].stage(
        model, prompt="a", new_tokens=2, count=1, quiet=True
    ),
}
# Commands that are slow here, or need what is not installed: they take the time from the same clock.
READ = {
    "quickstart", "quantize", "retrain lora", "retrain distill", "retrain local", "merge", "eval zeroshot", "eval generation",
    "eval all", "bench", "export gguf", "run",
}  # fmt: skip


def test_every_command_that_reports_seconds_is_looked_at() -> None:
    assert RUN.keys() | READ == REPORTING


@pytest.mark.parametrize("name", RUN)
@pytest.mark.usefixtures("stopped")
def test_seconds_are_those_of_the_whole_command(name: str, built: Built, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(TEXT)
    result = RUN[name](str(built("llama")), tmp_path)
    if not isinstance(result, Results):
        assert result.seconds == TAKEN
        return
    (one,) = result.results
    assert one.command_seconds == TAKEN
    assert 0 < one.seconds < TAKEN, "what measuring alone took"
    assert "the whole command took 72 min 1 s, loading included" in result.to_text()
    if (tmp_path / "r.json").is_file():
        assert load_results(tmp_path / "r.json").results[0].command_seconds == TAKEN


@pytest.mark.parametrize("name", sorted(READ))
def test_all_others_take_them_from_the_same_clock(name: str) -> None:
    module = inspect.getmodule(inspect.unwrap(COMMANDS[name].stage))
    shared = dict.fromkeys(("retrain lora", "retrain distill", "retrain local"), "retraining.export")
    shared |= dict.fromkeys(("eval zeroshot", "eval generation", "eval all"), "evaluation.evaluated_model")
    if name in shared:
        module = __import__(f"shortstack.{shared[name]}", fromlist=["command_seconds"])
    assert module is not None
    source = inspect.getsource(module)
    assert "command_seconds()" in source
    assert "seconds=time.perf_counter()" not in source


def test_results_of_several_commands_have_no_time_in_common(tmp_path: Path) -> None:
    one = Results(()).in_time(3.0)
    assert one.time_line() == []
