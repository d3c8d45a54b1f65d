"""`--dtype auto` on a CPU: by what it is and what is stored, at most the checkpoint's own precision, and said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shortstack.artifacts.scores import Scores
from shortstack.data.calibration import CalibrationSet
from shortstack.families.open_model import open_checkpoint
from shortstack.runtime import devices
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


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Makes the CPU one that can do what is named."""
    monkeypatch.setattr(devices, "_CPU", tmp_path / "cpuinfo")
    monkeypatch.setattr(devices, "_cpu", devices._cpu.__wrapped__)

    def make(flags: str) -> None:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: fpu vme {flags} sse\n\nprocessor\t: 1\n")

    return make


@pytest.mark.parametrize(
    ("flags", "stored", "chosen"),
    [
        ("avx512f", torch.bfloat16, "float32"),
        ("avx512f avx512_bf16", torch.bfloat16, "bfloat16"),
        ("amx_bf16 avx512_bf16", torch.bfloat16, "bfloat16"),
        ("amx_bf16 avx512_bf16", torch.float32, "float32"),
        ("amx_bf16 avx512_bf16", torch.float16, "float32"),
    ],
)
def test_the_cpu_decides_and_nothing_is_measured(
    cpu: Callable[[str], None], built: Built, flags: str, stored: torch.dtype, chosen: str
) -> None:
    """A person can predict it, and the same command gives the same numbers."""
    cpu(flags)
    said = Lines()
    assert scored(built("llama", dtype=stored), said).settings["dtype"] == chosen
    unit = flags.split()[0] if chosen == "bfloat16" and "amx" in flags else "avx512_bf16"
    line = (
        f"--dtype auto: bfloat16, because the checkpoint is stored in it and this CPU has instructions for it ({unit})"
    )
    assert said.said == [line] * (chosen == "bfloat16")


def test_a_machine_that_does_not_say_what_it_can_do_computes_in_float32(
    monkeypatch: pytest.MonkeyPatch, built: Built, tmp_path: Path
) -> None:
    monkeypatch.setattr(devices, "_CPU", tmp_path / "none")
    monkeypatch.setattr(devices, "_cpu", devices._cpu.__wrapped__)
    assert scored(built("llama", dtype=torch.bfloat16), Lines()).settings["dtype"] == "float32"


def test_a_precision_that_is_asked_for_is_taken(cpu: Callable[[str], None], built: Built) -> None:
    cpu("avx512_bf16")
    said = Lines()
    assert scored(built("llama", dtype=torch.bfloat16), said, dtype="float32").settings["dtype"] == "float32"
    assert said.said == []


def test_scores_say_what_they_were_computed_in(built: Built, tmp_path: Path) -> None:
    scored(built("llama"), Lines(), dtype="bfloat16").save(tmp_path / "s.json")
    assert json.loads((tmp_path / "s.json").read_text())["settings"]["dtype"] == "bfloat16"


@pytest.mark.fault(106)
@pytest.mark.parametrize(("stored", "lines"), [(torch.float64, 1), (torch.float32, 0), (torch.bfloat16, 0)])
def test_less_precision_than_is_stored_is_reported(
    cpu: Callable[[str], None], built: Built, stored: torch.dtype, lines: int
) -> None:
    cpu("avx512f")
    said = Lines()
    assert scored(built("llama", dtype=stored), said).settings["dtype"] == "float32"
    assert said.said == ["--dtype auto: float32 on cpu; the checkpoint is stored in F64"] * lines
