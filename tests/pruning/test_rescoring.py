"""`greedy --rescore`: after each block that goes, what is left is scored again, by any criterion."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import shortstack
from shortstack.artifacts.scores import CriterionScores
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.progress import Progress
from shortstack.errors import ShortstackError, UsageError
from shortstack.families.open_model import open_checkpoint
from shortstack.pruning import rescoring
from shortstack.pruning.rescoring import Between, Rescoring
from shortstack.runtime import devices

Built = Callable[..., Path]
QUIET = Progress(quiet=True)


def found(model: Path, data: str, **options: Any) -> Any:
    given = {"data": data, "samples": 3, "seq_len": 16, "quiet": True, "remove": 3, "selection": "greedy", **options}
    return shortstack.search(str(model), **given)


def by_hand(model: Path, data: str, criterion: str, steps: int, tmp_path: Path) -> list[int]:
    """Score, prune the lowest, score again: the commands that it takes the place of."""
    halves = tmp_path / "half.jsonl"
    halves.write_text("".join(Path(data).read_text().splitlines(keepends=True)[:3]))
    removed, current = [], model
    for step in range(steps):
        scores = shortstack.score(
            str(current), criterion=criterion, data=str(halves), samples=3, seq_len=16, quiet=True
        )
        removed.append(scores.criterion(criterion).order[0])
        out = tmp_path / f"by-hand-{criterion}-{step}"
        shortstack.prune(str(current), blocks=str(removed[-1]), out=out, quiet=True)
        current = out
    return removed


@pytest.mark.parametrize("criterion", ["taylor", "bi", "magnitude"])
def test_it_is_score_and_prune_again_and_again(built: Built, data: str, tmp_path: Path, criterion: str) -> None:
    made = found(built("llama"), data, rescore=criterion)
    assert made.why["rescored"] == {
        "by": criterion, "order": by_hand(built("llama"), data, criterion, 3, tmp_path)
    }  # fmt: skip
    assert sorted(made.why["rescored"]["order"]) == list(made.removed)
    assert made.why["measured"]["sets"][0]["by"] == f"greedy, rescored by {criterion}"


def test_by_perplexity_it_is_greedy(built: Built, data: str) -> None:
    assert found(built("llama"), data, rescore="ppl").removed == found(built("llama"), data).removed


def test_the_precision_is_said_once_and_not_at_each_step(
    built: Built, data: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "bfloat16_units", lambda: "some units")
    found(built("llama", dtype=torch.bfloat16), data, rescore="bi", quiet=False)
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if line.startswith("step ")]) == 3
    assert len([line for line in lines if "some units" in line]) == 1


def test_protected_blocks_stay_and_prune_takes_it(built: Built, data: str, tmp_path: Path) -> None:
    model = built("llama", num_hidden_layers=12)
    made = shortstack.prune(
        str(model), selection="greedy", rescore="bi", remove=2, data=data, samples=3, seq_len=16,
        out=tmp_path / "p", quiet=True,
    )  # fmt: skip
    assert set(made.plan.removed) <= set(range(4, 10))
    assert open_checkpoint(tmp_path / "p").depth == 10
    assert {path.name for path in tmp_path.iterdir()} == {"p", "rows.jsonl"}


class Scored:
    """Scores a checkpoint by an order, and notes what it was given."""

    def __init__(self, order: list[int], fails_at: int = 0) -> None:
        self.order, self.fails_at, self.given = order, fails_at, []

    def __call__(self, checkpoint: Checkpoint) -> CriterionScores:
        if len(self.given) + 1 == self.fails_at:
            raise KeyboardInterrupt
        norm = load_file(checkpoint.directory / "model.safetensors")["model.norm.weight"]
        self.given.append((checkpoint.original_blocks, float(norm[0])))
        left = sorted(checkpoint.original_blocks, key=lambda block: (self.order + list(range(6))).index(block))
        scores = tuple(float(left.index(block)) for block in checkpoint.original_blocks)
        return CriterionScores("toy", scores, checkpoint.original_blocks)


def stepping(model: Path, folder: Path, score: Any, **more: Any) -> Rescoring:
    return Rescoring(open_checkpoint(model), range(6), score, folder, {"key": 1}, QUIET, **more)


def test_what_is_changed_between_steps_is_what_is_scored(built: Built, tmp_path: Path) -> None:
    def double(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"] *= 2
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    score = Scored([2, 0, 5])
    steps = stepping(built("llama"), tmp_path / "work", score, between=Between(double, {"times": 2}))
    assert steps.first(3) == [2, 0, 5]
    assert steps.first(2) == [2, 0]
    blocks, norms = zip(*score.given, strict=True)
    assert blocks == ((0, 1, 2, 3, 4, 5), (0, 1, 3, 4, 5), (1, 3, 4, 5))
    assert norms[1] == pytest.approx(2 * norms[0])
    assert norms[2] == pytest.approx(4 * norms[0])
    left = [path.name for path in (tmp_path / "work").iterdir() if path.is_dir()]
    assert left == ["step-2"]  # one at a time


def test_steps_that_were_changed_otherwise_are_not_those_of_this_run(built: Built, tmp_path: Path) -> None:
    for key, order in ((None, [2, 0]), ({"repair": "auto"}, [1, 3]), ({"repair": "scale"}, [3, 1])):
        between = None if key is None else Between(lambda _: None, key)
        for given in (order, [5, 4]):  # the second time what the first one found is taken
            steps = stepping(built("llama"), tmp_path / "work", Scored(given), between=between)
            assert steps.first(2) == order


def test_killed_it_resumes_at_its_step(built: Built, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        stepping(built("llama"), tmp_path / "work", Scored([2, 0, 5], fails_at=3)).first(3)
    score = Scored([2, 0, 5])
    assert stepping(built("llama"), tmp_path / "work", score).first(3) == [2, 0, 5]
    assert [blocks for blocks, _ in score.given] == [(1, 3, 4, 5)]
    other = Scored([1, 0])
    again = Rescoring(open_checkpoint(built("llama")), range(6), other, tmp_path / "work", {"key": 2}, QUIET)
    assert again.first(1) == [1]


def test_blocks_that_cannot_go_are_passed_over_and_said(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rescoring, "reason_against", lambda _, kept: "it is needed" if 2 not in kept else None)
    steps = stepping(built("llama"), tmp_path / "work", Scored([2, 0, 5]))
    steps.progress = Progress()
    assert steps.first(1) == [0]
    assert "block 0 is removed; it has the lowest score of the removable blocks (block 2 is not: it is needed)" in (
        capsys.readouterr().err.replace("\n", " ")
    )
    monkeypatch.setattr(rescoring, "reason_against", lambda *_: "it is needed")
    with pytest.raises(ShortstackError, match="after 1 steps no block can be removed exactly"):
        steps.first(2)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"selection": "beam:2", "rescore": "bi"}, "--rescore bi: no effect with --selection beam:2"),
        ({"rescore": "bi,taylor"}, "expected one criterion"),
        ({"rescore": "angular:n=3"}, "scores runs of blocks"),
        ({"rescore": "tailor"}, "unknown criterion"),
        ({"rescore": "bi", "objective": "mean"}, "--objective mean: no effect with --rescore"),
    ],
)
def test_what_cannot_be_rescored(built: Built, data: str, given: dict[str, Any], says: str) -> None:
    from shortstack.pruning.search import search

    options = {"data": data, "samples": 3, "seq_len": 16, "remove": 1, "selection": "greedy", **given}
    with pytest.raises(UsageError, match=says):
        search(str(built("llama")), **options)


def test_prune_needs_the_selection(built: Built, tmp_path: Path) -> None:
    from shortstack.pruning.prune import prune

    with pytest.raises(UsageError, match="--rescore bi: no effect without --selection greedy"):
        prune(str(built("llama")), rescore="bi", blocks="1", out=tmp_path / "p")
