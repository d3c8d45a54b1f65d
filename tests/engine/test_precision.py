"""`--dtype auto` on a CPU: measured, at most the checkpoint's own precision, said, and kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shortstack.artifacts.scores import Scores
from shortstack.data.calibration import CalibrationSet
from shortstack.engine import cpu as precision
from shortstack.families.open_model import open_checkpoint
from shortstack.scoring.criteria import parse_criteria
from shortstack.scoring.score import score_windows
from tests import pico

Built = Callable[..., Path]


class Lines:
    """Takes what a run says."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def __getattr__(self, name: str) -> Any:
        from shortstack.common.progress import Progress

        return getattr(Progress(quiet=True), name)

    def say(self, line: str) -> None:
        self.said.append(line)


def scored(model: Path, said: Lines, **options: Any) -> Scores:
    windows = CalibrationSet(pico.windows(), {})
    return score_windows(open_checkpoint(model), windows, parse_criteria("ppl"), progress=said, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("speed", "chosen"), [(1.29, "float32"), (1.31, "bfloat16")])
def test_bfloat16_is_taken_where_it_is_clearly_faster(
    built: Built, monkeypatch: pytest.MonkeyPatch, speed: float, chosen: str
) -> None:
    monkeypatch.setattr(precision, "_LONG_RUN", 1.0)
    monkeypatch.setattr(precision, "bfloat16_speed", lambda *_: speed)
    said = Lines()
    found = scored(built("llama", dtype=torch.bfloat16), said)
    assert found.settings["dtype"] == chosen
    assert [line for line in said.said if line.startswith(f"--dtype auto: {chosen}; ") and "1.3 times" in line]


def test_what_is_stored_in_float32_and_what_is_short_is_not_measured(
    built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "bfloat16_speed", lambda *_: pytest.fail("measured"))
    assert scored(built("llama", dtype=torch.bfloat16), Lines()).settings["dtype"] == "float32"  # short
    monkeypatch.setattr(precision, "_LONG_RUN", 1.0)
    assert scored(built("llama"), Lines()).settings["dtype"] == "float32"
    assert scored(built("llama", dtype=torch.float16), Lines()).settings["dtype"] == "float32"


def test_a_run_that_goes_on_keeps_its_precision(built: Built, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A second measurement could come out otherwise, and would throw the saved state away."""
    monkeypatch.setattr(precision, "_LONG_RUN", 1.0)
    monkeypatch.setattr(precision, "bfloat16_speed", lambda *_: 2.0)
    model = built("llama", dtype=torch.bfloat16)
    first = scored(model, Lines(), work_folder=tmp_path / "work", save_every=0.0)
    monkeypatch.setattr(precision, "bfloat16_speed", lambda *_: pytest.fail("measured again"))
    said = Lines()
    second = scored(model, said, work_folder=tmp_path / "work", save_every=0.0)
    assert second.settings["dtype"] == "bfloat16"
    assert second.criteria == first.criteria
    assert any("going on" in line for line in said.said)


def test_measuring_takes_half_a_second_and_gives_a_ratio() -> None:
    import time

    started = time.perf_counter()
    ratio = precision.bfloat16_speed(256, 96)
    assert 0.01 < ratio < 100
    assert time.perf_counter() - started < 30  # half a second, on a machine that does other things too


def test_scores_say_what_they_were_computed_in(built: Built, tmp_path: Path) -> None:
    scored(built("llama"), Lines(), dtype="bfloat16").save(tmp_path / "s.json")
    assert json.loads((tmp_path / "s.json").read_text())["settings"]["dtype"] == "bfloat16"


@pytest.mark.fault(106)
@pytest.mark.parametrize(("stored", "lines"), [(torch.float64, 1), (torch.float32, 0), (torch.bfloat16, 0)])
def test_less_precision_than_is_stored_is_reported(built: Built, stored: torch.dtype, lines: int) -> None:
    said = Lines()
    assert scored(built("llama", dtype=stored), said).settings["dtype"] == "float32"
    assert said.said == ["--dtype auto: float32 on cpu; the checkpoint is stored in F64"] * lines
