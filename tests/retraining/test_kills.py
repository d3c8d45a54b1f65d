"""SIGKILL at any moment of a run: the same command resumes, and ends as if nothing had happened."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.kills import Sweep, Warm, hashes
from tests.retraining.test_resume import figures

pytestmark = pytest.mark.fault(51, 52, 70)
STEPS = 12


@pytest.fixture
def arguments(rows: Path, text: Path, dense: Path, teacher_cache: Path) -> dict[str, list[str]]:
    return {
        "lora": ["lora", "--data", str(rows), "--cutoff", "400"],
        "cpt": ["cpt", "--data", str(text), "--seq-len", "32"],
        "distill": ["distill", "--data", str(text), "--seq-len", "32", "--teacher", str(dense)],
        "offline": ["distill", "--offline", str(teacher_cache)],
        "local": [
            "local",
            "--data",
            str(text),
            "--seq-len",
            "32",
            "--of",
            str(dense),
            "--tokens",
            "768",
            "--radius",
            "1",
        ],
    }


def outcome(out: Path) -> object:
    """The weights to the byte, and every figure that was logged."""
    found = hashes(out)
    adapter = found.get("adapter/adapter_model.safetensors")
    return found["model.safetensors"], found["config.json"], adapter, figures(out)


def sweep_of(way: str, warm: Warm, arguments: dict[str, list[str]], pruned: Path, folder: Path) -> Sweep:
    method, *rest = arguments[way]
    argv = [
        "retrain", method, str(pruned), *rest, "--out", str(folder / "out"), "--batch", "4", "--micro-batch", "2",
        "--lr", "1e-2", "--save-every", "2", "--log-every", "1",
        *(["--max-steps", str(STEPS), "--eval-every", "2"] if way != "local" else []),  # two blocks of six steps
    ]  # fmt: skip
    return Sweep(warm, pruned, folder, argv, "out", outcome)


@pytest.mark.parametrize("way", ["lora", "cpt", "distill", "offline", "local"])
def test_killed_again_and_again_it_resumes(
    way: str, warm: Warm, arguments: dict[str, list[str]], pruned: Path, tmp_path: Path
) -> None:
    """Before the first checkpoint, in the middle, right before the end: the last run ends as if nothing had happened."""
    sweep = sweep_of(way, warm, arguments, pruned, tmp_path / "f")
    sweep.empty()
    work, log = tmp_path / "f/.out.shortstack-work", tmp_path / "log.txt"
    for before, sign in ((0, "run.json"), (0, "checkpoints/checkpoint-6"), (6, "checkpoints/checkpoint-10")):
        there = work / sign if sign == "run.json" else work / sign / "complete.json"
        assert warm.run(sweep.argv, log, sign=there)["code"] == -signal.SIGKILL, log.read_text()
        assert ("resuming" in said(tmp_path)) is bool(before)
        assert not before or f"resuming from step {before} " in said(tmp_path)
        sweep.check()
    sweep.check_and_run_again()
    assert "resuming from step 10 " in said(tmp_path)


def said(tmp_path: Path) -> str:
    """By the last run."""
    return (tmp_path / "log.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["lora", "cpt", "distill", "offline", "local"])
def test_killed_at_many_moments(
    way: str, warm: Warm, arguments: dict[str, list[str]], pruned: Path, tmp_path: Path
) -> None:
    sweep = sweep_of(way, warm, arguments, pruned, tmp_path / "f")
    sweep.empty()
    started = time.perf_counter()
    sweep.check_and_run_again()
    longest = time.perf_counter() - started
    resumed = 0
    for share in range(1, 26):
        sweep.kill(delay=longest * share / 25)
        resumed += "resuming from step" in said(tmp_path)
    assert sweep.kills >= 10, "the runs ended before they were killed"
    assert resumed >= 5
