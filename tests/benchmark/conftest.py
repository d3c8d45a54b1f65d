"""What tests of measuring share: a dense model and it without two blocks, and engines that only say who was called."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import shortstack
from shortstack.benchmark import sweep
from shortstack.benchmark.floors import Machine
from tests.benchmark.material import counted


@pytest.fixture
def models(built: Callable[..., Path], tmp_path: Path) -> list[str]:
    """A dense model, and it without two blocks."""
    dense = tmp_path / "dense"
    shutil.copytree(built("llama"), dense)
    shortstack.prune(str(dense), out=tmp_path / "cut", blocks="1,4", quiet=True)
    return [str(dense), str(tmp_path / "cut")]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int, int]]:
    """Engines that only say who was called, on a machine that was measured before."""
    called: list[tuple[str, int, int, int]] = []
    monkeypatch.setattr(sweep, "open_engine", counted(called))
    monkeypatch.setattr(sweep, "measured_machine", lambda *_: Machine(1e9, 1e12))
    return called
