"""Are these windows enough? Rounds of windows until the chosen blocks settle."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shortstack.cli.app import run
from shortstack.common.significance import student_errors
from shortstack.errors import ShortstackError, UsageError
from shortstack.scoring.early_stopping import ROUNDS, Stability, separated
from shortstack.scoring.runner import ScoringRun
from shortstack.scoring.score import score
from tests import pico
from tests.retraining.processes import launched

Built = Callable[..., Path]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"input_ids": window}) for window in pico.windows(40, 16)))
    return path


def judged(sets: list[set[int]], blocks: int = 6, remove: int = 2) -> Stability:
    """A stability that sees, in each round, losses by which a given set is the lowest, within the errors."""
    stability = Stability(range(blocks), (), remove)
    generator = torch.Generator().manual_seed(0)
    seen = torch.empty(blocks, 0, dtype=torch.float64)
    for chosen in sets:
        seen = torch.randn(blocks, 2 + seen.shape[1], generator=generator, dtype=torch.float64)
        seen -= seen.mean(dim=1, keepdim=True)
        seen[list(chosen)] -= 1e-3
        if stability.judge(seen):
            break
    return stability


def test_it_is_enough_when_nothing_has_changed_for_three_rounds() -> None:
    assert judged([{1, 2}] * ROUNDS).reason == ""
    settled = judged([{1, 2}, {1, 3}, *[{0, 3}] * 10])
    assert (settled.reason, len(settled.chosen)) == ("unchanged", 2 + 1 + ROUNDS)
    assert settled.to_json()["rounds"][0]["chosen"] == [1, 2]
    assert "would have removed 0 of these 2" in settled.to_text()
    restless = judged([{1, 2}, {1, 3}] * 6)
    restless.ended()
    assert restless.reason == "exhausted"
    assert "not settled" in restless.to_text()


@given(st.integers(0, 1000), st.integers(2, 12), st.integers(1, 4))
def test_separated_is_every_pair_beyond_its_paired_error(seed: int, windows: int, remove: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    nll = torch.randn(5, windows, generator=generator, dtype=torch.float64) + 2 * torch.arange(5)[:, None]
    order = nll.mean(dim=1).argsort().tolist()
    gone, left = order[:remove], order[remove:]
    expected = True
    for a, b in itertools.product(gone, left):
        differences = [float(nll[b, w] - nll[a, w]) for w in range(windows)]
        mean = sum(differences) / windows
        error = math.sqrt(sum((d - mean) ** 2 for d in differences) / (windows - 1) / windows)
        expected &= mean > student_errors(windows) * error
    assert separated(nll, gone, left) == expected


def test_protected_blocks_are_not_looked_at() -> None:
    stability = Stability(range(8), (0, 7), 1)
    nll = torch.arange(8, dtype=torch.float64)[:, None].repeat(1, 4)
    assert stability.judge(nll)
    assert (stability.chosen, stability.reason) == ([(1,)], "separated")
    for remove in (0, 6, 9):
        with pytest.raises(UsageError, match=f"--remove {remove}: expected 1 to 5"):
            Stability(range(8), (0, 7), remove)


def options(rows: Path, **more: Any) -> dict[str, Any]:
    return {"data": str(rows), "samples": 2, "until": "stable", "remove": 2, "max_samples": 40, "quiet": True, **more}


def test_the_scores_are_those_of_all_windows_that_it_took(built: Built, rows: Path) -> None:
    model = str(built("llama"))
    found = score(model, **options(rows))
    used = found.settings["until"]["windows"]
    assert found.calibration["samples"] == used
    assert len(found.calibration["marks"]["hashes"]) == used
    plain = score(model, data=str(rows), samples=used, quiet=True)
    for name in ("scores", "stderr", "dense_ppl"):
        assert getattr(found.criterion(), name) == pytest.approx(getattr(plain.criterion(), name), rel=1e-9)
    assert found.criterion().order == plain.criterion().order
    assert set(found.settings["until"]["rounds"][-1]["chosen"]) == set(plain.criterion().order[:2])
    assert found.settings["until"]["says"] in found.to_text()


def test_no_more_text(built: Built, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("some words that are few " * 12)
    found = score(str(built("llama")), **options(text, seq_len=16, samples=3, remove=3))
    assert found.settings["until"]["windows"] <= 18
    assert found.settings["until"]["reason"] in ("exhausted", "unchanged", "separated")


def test_interrupted_it_goes_on_with_the_next_round(
    built: Built, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = str(built("llama")), tmp_path / "scores.json"
    whole = score(model, **options(rows))
    assert len(whole.settings["until"]["rounds"]) > 3
    real = Stability.judge

    def stop(self: Stability, nll: torch.Tensor) -> bool:
        if nll.shape[1] == 6:
            raise KeyboardInterrupt
        return real(self, nll)

    with monkeypatch.context() as patch:
        patch.setattr(Stability, "judge", stop)
        with pytest.raises(KeyboardInterrupt):
            score(model, **options(rows, out=out, save_every=0.0))
    swept = 0
    real_gather = ScoringRun._of_all

    def counted(self: ScoringRun, *arguments: Any) -> Any:
        nonlocal swept
        swept += 1
        return real_gather(self, *arguments)

    monkeypatch.setattr(ScoringRun, "_of_all", counted)
    again = score(model, **options(rows, out=out, save_every=0.0))
    assert again.criterion().scores == whole.criterion().scores
    assert again.settings["until"] == whole.settings["until"]
    # Two rounds were kept; the third one's state was, too, and is swept no further.
    assert swept == len(whole.settings["until"]["rounds"]) - 2
    assert not list(tmp_path.glob(".scores*"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"remove": None}, "--until stable needs the number of blocks"),
        ({"criterion": "ppl,taylor"}, "for ppl only"),
        ({"criterion": "magnitude"}, "for ppl only"),
        ({"max_samples": 3}, "--max-samples 3: expected at least two rounds of --samples 2"),
        ({"until": None}, "--remove: no effect without --until stable"),
        ({"until": None, "remove": None, "max_samples": 40}, "--max-samples 40: no effect without --until stable"),
        ({"remove": 6}, "--remove 6: expected 1 to 5"),
    ],
)
def test_what_makes_no_sense(more: dict[str, Any], message: str, built: Built, rows: Path) -> None:
    with pytest.raises(ShortstackError, match=message):
        score(str(built("llama")), **options(rows, **more))


def until_stable(model: Path, rows: Path) -> list[str]:
    options = "--until stable --remove 2 --samples 4 --max-samples 40"
    return ["score", str(model), "--data", str(rows), *options.split()]


def test_on_the_command_line(built: Built, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(until_stable(built("llama"), rows)) == 0
    shown = capsys.readouterr()
    assert "4 windows: would remove" in shown.err
    assert " windows: " in shown.out.splitlines()[-1]


@pytest.mark.slow
def test_two_processes_take_the_same_rounds(built: Built, rows: Path, tmp_path: Path) -> None:
    model = built("llama")
    common = until_stable(model, rows)
    process = launched("ddp", 2, [*common, "--out", str(tmp_path / "two.json")], tmp_path)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert run([*common, "--out", str(tmp_path / "one.json")]) == 0
    two, one = (json.loads((tmp_path / name).read_text()) for name in ("two.json", "one.json"))
    assert two["criteria"]["ppl"]["scores"] == pytest.approx(one["criteria"]["ppl"]["scores"], rel=1e-6)
    assert two["settings"]["until"]["rounds"] == one["settings"]["until"]["rounds"]
