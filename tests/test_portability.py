"""macOS: the whole way with what that system lacks taken away, and processes that are started afresh."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import macos

REPOSITORY = Path(__file__).resolve().parents[1]


def _run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.macos", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)


@pytest.mark.fault(104)
def test_score_plan_and_prune_on_macos(tmp_path: Path, built: Callable[..., Path]) -> None:
    model, scores, plan, out = built("llama"), tmp_path / "scores.json", tmp_path / "plan.json", tmp_path / "out"
    done = _run(
        "score", model, "--seq-len", "32", "--memory", "streamed", "--criterion", "ppl,taylor", "--out", scores, "then",
        "plan", model, "--scores", scores, "--criterion", "ppl", "--remove", "2", "--out", plan, "then",
        "prune", model, "--plan", plan, "--verify", "--out", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "verified" in done.stdout
    assert len(json.loads((out / "shortstack.json").read_text())["kept_blocks"]) == 4


@pytest.mark.fault(104)
def test_workers_that_are_started_afresh(tmp_path: Path, built: Callable[..., Path]) -> None:
    """macOS spawns them, and so does Python 3.14: what they are given must be picklable."""
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"instruction": f"say {n}", "output": "yes, that"} for n in range(8)]))
    done = _run(
        "retrain", "lora", built("llama", max_position_embeddings=512), "--data", rows, "--workers", "1",
        "--max-steps", "1", "--batch", "2", "--micro-batch", "2", "--validation", "2", "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.fault(104)
def test_no_name_is_used_that_macos_lacks() -> None:
    """mypy knows which system has which name, also on paths that no test takes."""
    command = [sys.executable, "-m", "mypy", "--platform", "darwin", "--no-error-summary"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout


def test_what_is_taken_away_is_there_on_linux() -> None:
    if sys.platform == "linux":
        import fcntl
        import mmap
        import os

        assert hasattr(os, "fdatasync")
        assert hasattr(mmap, "MADV_HUGEPAGE")
        assert not hasattr(fcntl, "F_FULLFSYNC")
    assert {"fdatasync", "posix_fadvise", "sched_getaffinity"} <= set(macos.LACKING["os"])


def test_windows_is_told_in_two_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    from shortstack import __main__

    monkeypatch.setattr(__main__.sys, "platform", "win32")
    with pytest.raises(SystemExit, match="not on Windows itself\nhint: run it in WSL 2"):
        __main__.main()


def test_windows_is_told_in_python_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks, memory and processes are those of POSIX (fcntl, resource): nothing is begun that cannot end."""
    import shortstack

    monkeypatch.setattr(sys, "platform", "win32")
    for name in ("prune", "load_plan"):
        with pytest.raises(shortstack.ShortstackError, match="not on Windows itself\nrun it in WSL 2"):
            getattr(shortstack, name)
