"""Promise 5: killed with SIGKILL at any moment, an output is absent or complete, and the next run succeeds."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import pico
from tests.kills import Warm, kill_command, prune_sweep, score_sweep

Built = Callable[..., Path]
pytestmark = pytest.mark.fault(51, 52, 53)
SHARDS = {"shard_bytes": 60_000, "num_hidden_layers": 4}  # few writes, and more than one file of each kind
counted = {"forked": 0, "commands": 0}


def shares(wanted: int, killed: Callable[[], int]) -> Iterator[float]:
    """Shares of a run's time after which to kill it, until enough kills came in time."""
    for attempt, share in enumerate(itertools.cycle((0.1, 0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9))):
        if killed() >= wanted:
            return
        assert attempt < 6 * wanted, "the run ends before it is killed"
        yield share


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("windows") / "w.jsonl"
    path.write_text("".join(json.dumps({"input_ids": window}) + "\n" for window in pico.windows()))
    return path


@pytest.mark.parametrize("options", [{}, SHARDS], ids=["one-file", "shards"])
def test_prune_killed_in_every_write(built: Built, warm: Warm, tmp_path: Path, options: dict[str, int]) -> None:
    sweep = prune_sweep(warm, built("llama", **options), tmp_path / "f")
    for nth in range(1, sweep.writes + 1):
        sweep.kill(kill_at=nth)
    counted["forked"] += sweep.kills
    assert sweep.kills == sweep.writes >= 30


def test_prune_killed_after_a_while(built: Built, warm: Warm, tmp_path: Path) -> None:
    sweep = prune_sweep(warm, built("llama", **SHARDS), tmp_path / "f")
    started = time.perf_counter()
    sweep.check_and_run_again()
    longest = time.perf_counter() - started
    for share in shares(10, lambda: sweep.kills):
        sweep.kill(delay=share * longest)
    counted["forked"] += sweep.kills


def test_score_killed_in_writes(built: Built, warm: Warm, windows: Path, tmp_path: Path) -> None:
    """It resumes from its last saved state: the same scores bit for bit."""
    sweep = score_sweep(warm, built("llama", **SHARDS), tmp_path / "f", windows)
    for nth in range(1, sweep.writes + 1):
        sweep.kill(kill_at=nth)
    counted["forked"] += sweep.kills
    assert sweep.kills >= 20


def test_prune_the_whole_command(built: Built, warm: Warm, tmp_path: Path) -> None:
    sweep = prune_sweep(warm, built("llama"), tmp_path / "f")
    started = time.perf_counter()
    assert kill_command([*sweep.argv, "--force"], 60) == 0
    longest = time.perf_counter() - started
    killed = [0]
    for share in shares(13, lambda: killed[0]):
        sweep.empty()
        killed[0] += kill_command(sweep.argv, share * longest) == -9
        sweep.check_and_run_again()
    counted["commands"] += killed[0]


def test_score_the_whole_command(built: Built, warm: Warm, windows: Path, tmp_path: Path) -> None:
    sweep = score_sweep(warm, built("llama"), tmp_path / "f", windows)
    started = time.perf_counter()
    assert kill_command(sweep.argv, 60) == 0
    longest = time.perf_counter() - started
    killed = [0]
    for share in shares(2, lambda: killed[0]):
        sweep.empty()
        killed[0] += kill_command(sweep.argv, (0.5 + 0.5 * share) * longest) == -9
        sweep.check_and_run_again()
    counted["commands"] += killed[0]


def test_that_was_enough() -> None:
    """At least 100 kills, 15 of them of the whole command (the tests above, in this process)."""
    if not all(counted.values()):
        pytest.skip("only some of the tests above were run")
    assert counted["commands"] >= 15
    assert sum(counted.values()) >= 100
