"""Plans choose by count, ratio, size or list, protect blocks, and check themselves."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shortstack.artifacts.plan import PrunePlan, load_plan
from shortstack.artifacts.protected import protected_blocks
from shortstack.artifacts.scores import CriterionScores, Scores
from shortstack.errors import ShortstackError, UsageError
from shortstack.families.open_model import open_checkpoint
from shortstack.pruning.budget import parse_amount
from shortstack.pruning.plan import parse_blocks, plan, plan_for

Built = Callable[..., Path]


def scores_for(model: Path, values: list[float], **criteria: list[float]) -> Scores:
    checkpoint = open_checkpoint(model)
    named = {"ppl": values, **criteria}
    found = {name: CriterionScores(name, tuple(v), checkpoint.original_blocks) for name, v in named.items()}
    return Scores(checkpoint.source, checkpoint.fingerprint, checkpoint.original_blocks, found)


DEEP = [9.0, 8.0, 1.0, 7.0, 3.0, 2.0, 6.0, 5.0, 4.0, 0.5, 0.2, 0.1]


def test_plus_is_on_from_ten_blocks(built: Built) -> None:
    model = built("llama", num_hidden_layers=12)
    made = plan_for(open_checkpoint(model), scores=scores_for(model, DEEP), remove=3).plan
    assert made.protected == (0, 1, 2, 3, 10, 11)
    assert made.removed == (4, 5, 9)  # 10 and 11 score lower, but stay
    free = plan_for(open_checkpoint(model), scores=scores_for(model, DEEP), remove=3, plus=False).plan
    assert free.removed == (9, 10, 11)
    assert free.protected == ()


def test_plus_is_off_below_ten_blocks_and_says_so(built: Built) -> None:
    made = plan_for(
        open_checkpoint(built("llama")), scores=scores_for(built("llama"), [1, 2, 3, 4, 5, 6]), remove=2
    ).plan
    assert made.removed == (0, 1)
    assert "no block is protected below 10 blocks" in made.note


def test_more_than_may_go(built: Built) -> None:
    model = built("llama", num_hidden_layers=12)
    with pytest.raises(
        ShortstackError, match=r"7 blocks to remove, but only 6 of 12 are removable \(kept: 0-3, 10-11\)"
    ) as caught:
        plan_for(open_checkpoint(model), scores=scores_for(model, DEEP), remove=7)
    assert caught.value.hint == "--remove 6 or fewer; up to 11 with --no-plus"
    with pytest.raises(ShortstackError, match=r"12 blocks to remove, but only 11 of 12"):
        plan_for(open_checkpoint(model), scores=scores_for(model, DEEP), remove=12, plus=False)


def test_by_ratio_and_by_size(built: Built) -> None:
    model = built("llama")
    checkpoint = open_checkpoint(model)
    block, total = checkpoint.block_parameters()[0], checkpoint.parameters()
    scores = scores_for(model, [1, 2, 3, 4, 5, 6])
    exactly_two = 2 * block / total
    assert len(plan_for(checkpoint, scores=scores, ratio=exactly_two).plan.removed) == 2
    assert len(plan_for(checkpoint, scores=scores, ratio=exactly_two - 1e-6).plan.removed) == 1
    assert len(plan_for(checkpoint, scores=scores, ratio=0).plan.removed) == 0
    assert len(plan_for(checkpoint, scores=scores, params=str(total - 3 * block + block // 3)).plan.removed) == 3
    made = plan_for(checkpoint, scores=scores, remove=2).plan
    assert made.removal_ratio == pytest.approx(exactly_two)
    assert made.after["parameters"] == total - 2 * block


def test_contiguous(built: Built) -> None:
    model = built("llama")
    made = plan_for(
        open_checkpoint(model), scores=scores_for(model, [1, 9, 2, 3, 9, 1]), remove=2, strategy="contiguous"
    ).plan
    assert made.removed == (2, 3)


@pytest.mark.fault(91)
def test_ties_go_by_index(built: Built) -> None:
    model = built("llama")
    assert plan_for(open_checkpoint(model), scores=scores_for(model, [1.0] * 6), remove=2).plan.removed == (0, 1)


def close(model: Path, scores: list[float], error: float, windows: int = 10, **calibration: Any) -> Scores:
    """Perplexities without each block, each with the same error in NLL."""
    found = scores_for(model, scores)
    row = replace(found.criteria["ppl"], stderr=(error,) * len(scores), dense_ppl=2.0)
    record = {"source": "calibration.txt", "samples": windows, "seq_len": 16, "sampling": "documents", "seed": 3}
    return replace(found, criteria={"ppl": row}, calibration={**record, **calibration})


def test_the_last_block_and_the_next_are_compared_beyond_their_errors(built: Built) -> None:
    model = built("llama")
    checkpoint = open_checkpoint(model)
    apart = [3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    assert "within the error" not in plan_for(checkpoint, scores=close(model, apart, 0.05), remove=2).plan.to_text()
    note = plan_for(checkpoint, scores=close(model, apart, 0.1), remove=2).plan.note  # log(5/4) is 0.22
    assert (
        "block 1, the last one chosen, and block 2, the next, are within the error of their scores (0.22 ±0.14" in note
    )
    assert "10 windows" in note
    few = plan_for(checkpoint, scores=close(model, apart, 0.06, windows=3), remove=2).plan.note
    assert "within the error" in few, "2.6 errors of three windows are nothing"
    assert "within the error" not in plan_for(checkpoint, scores=close(model, apart, 0.06), remove=2).plan.note
    assert "within the error" not in plan_for(checkpoint, scores=scores_for(model, apart), remove=2).plan.note
    assert "within the error" not in plan_for(checkpoint, scores=close(model, apart, 0.1), remove=0).plan.note


def test_what_to_type_next_can_be_typed(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shortstack.cli.app import run as cli

    monkeypatch.chdir(tmp_path)
    (tmp_path / "calibration.txt").write_text("some words of a text that is long enough to be drawn from. " * 40)
    (tmp_path / "model").symlink_to(built("llama"))
    for extra in ({}, {"samples": 300}):
        made = plan("model", scores=close(tmp_path / "model", [3.0, 3.1, 3.2, 3.3, 3.4, 3.5], 1.0, **extra), remove=2)
        (line,) = [line for line in made.to_text().splitlines() if line.startswith("to find out: ")]
        typed = shlex.split(line.removeprefix("to find out: "))
        assert typed[0] == "shortstack"
        assert ("--until" in typed) == (not extra)
        assert "1200" in typed or not extra
        if not extra:
            assert cli([*typed[1:], "--quiet"]) == 0
            assert plan("model", scores=tmp_path / "more-windows.json", remove=2).removed


def test_what_was_removed_before_is_shown_and_not_removed_again(built: Built, tmp_path: Path) -> None:
    from shortstack.pruning.prune import prune

    prune(str(built("llama")), blocks="1,5", out=tmp_path / "p", quiet=True)
    made = plan(str(tmp_path / "p"), blocks="3", out=tmp_path / "plan.json")
    assert "already removed  1, 5, of the original model" in made.to_text()
    assert load_plan(tmp_path / "plan.json").gone == made.gone == (1, 5)
    with pytest.raises(ShortstackError, match=r"blocks 1, 5 are removed already; it has blocks 0, 2-4"):
        plan(str(tmp_path / "p"), blocks="1,3,5")
    with pytest.raises(ShortstackError, match="no block 6"):
        plan(str(tmp_path / "p"), blocks="6")
    assert "already removed" not in plan(str(built("llama")), blocks="3").to_text()


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("6", r"no block 6; it has blocks 0-5"),
        ("1,1", r"block 1 is listed twice"),
        ("1-3,2", r"block 2 is listed twice"),
        ("0-5", r"removing 6 of 6 blocks leaves none"),
        ("-1", r"is not a block number"),
        ("1.5", r"is not a block number"),
        ("3-1", r"runs backwards"),
        ("", r"is not a block number"),
    ],
)
@pytest.mark.fault(46, 47)
def test_bad_lists(built: Built, blocks: str, message: str) -> None:
    with pytest.raises(ShortstackError, match=message):
        plan_for(open_checkpoint(built("llama")), blocks=blocks)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"blocks": "1", "remove": 1},
        {"scores": "s"},
        {"scores": "s", "remove": 1, "ratio": 0.1},
        {"scores": "s", "params": "many"},
        {"scores": "s", "ratio": 1.0},
        {"scores": "s", "remove": -1},
    ],
)
def test_contradictions_are_usage_errors(built: Built, options: dict[str, Any]) -> None:
    model = built("llama")
    if "scores" in options:
        options = {**options, "scores": scores_for(model, [1, 2, 3, 4, 5, 6])}
    with pytest.raises(UsageError):
        plan_for(open_checkpoint(model), **options)


def test_scores_of_another_model(built: Built) -> None:
    with pytest.raises(ShortstackError, match="another checkpoint"):
        plan_for(
            open_checkpoint(built("llama", seed=3)), scores=scores_for(built("llama"), [1, 2, 3, 4, 5, 6]), remove=1
        )


def test_which_criterion(built: Built) -> None:
    model = built("llama")
    both = scores_for(model, [1, 2, 3, 4, 5, 6], taylor=[6, 5, 4, 3, 2, 1])
    assert plan_for(open_checkpoint(model), scores=both, criterion="taylor", remove=1).plan.removed == (5,)
    with pytest.raises(ShortstackError, match="hold ppl, taylor"):
        plan_for(open_checkpoint(model), scores=both, remove=1)
    with pytest.raises(ShortstackError, match="hold ppl, taylor, not magnitude"):
        plan_for(open_checkpoint(model), scores=both, criterion="magnitude", remove=1)


class TestBlockOrder:
    @pytest.mark.parametrize("text", ["3,1,0,2,5,4\n", "\ufeff3, 1,0,2,5,4"])
    def test_is_taken_wherever_scores_are(self, built: Built, tmp_path: Path, text: str) -> None:
        path = tmp_path / "block_order.csv"
        path.write_text(text, encoding="utf-8")
        assert plan(str(built("llama")), scores=path, criterion="ppl", remove=2).removed == (1, 3)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("0,1,2", "scores for blocks 0-2, but .* has blocks 0-5"),
            (",".join(map(str, range(32))), "scores for blocks 0-31, but .* has blocks 0-5"),
            ("0,1,2,3,4,4", "row 1, cell 6: duplicate block 4"),
            ("0,1,2,3,4,-5", "row 1, cell 6: '-5' is not a block number"),
            ("0,1,2,3,4,5.0", "cell 6: '5.0' is not a block number"),
            ("0\x1f,1", "scores for blocks 0-1, but"),
            ("=cmd(),1", "cell 1: '=cmd.*' is not a block number"),
            ("0,1\n2,3", "expected one line of block numbers, found 2"),
            ("", "expected one line of block numbers, found 0"),
        ],
    )
    @pytest.mark.fault(46)
    def test_bad_ones(self, built: Built, tmp_path: Path, text: str, message: str) -> None:
        path = tmp_path / "order.csv"
        path.write_text(text)
        with pytest.raises(ShortstackError, match=message):
            plan(str(built("llama")), scores=path, remove=1)

    def test_has_no_scores_to_add_up(self, built: Built, tmp_path: Path) -> None:
        path = tmp_path / "order.csv"
        path.write_text("0,1,2,3,4,5")
        with pytest.raises(ShortstackError, match="a block order has none"):
            plan(str(built("llama")), scores=path, remove=2, strategy="contiguous")


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"schema": 2}', '{"schema": 1, "model": {}}', "nonsense"])
def test_what_is_no_scores_file(built: Built, tmp_path: Path, text: str) -> None:
    path = tmp_path / "scores.json"
    path.write_text(text)
    with pytest.raises(ShortstackError, match=r"scores\.json"):
        plan(str(built("llama")), scores=path, remove=1)


def test_a_plan_is_written_and_read(built: Built, tmp_path: Path) -> None:
    made = plan(str(built("llama")), blocks="1,3", out=tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == made
    assert "2 of 6 blocks are removed" in made.to_text()
    record = json.loads((tmp_path / "plan.json").read_text())
    record["removed"] = [1, 1]
    (tmp_path / "plan.json").write_text(json.dumps(record))
    with pytest.raises(ShortstackError, match="listed twice"):
        load_plan(tmp_path / "plan.json")


def test_an_amount_that_removes_nothing_says_so(built: Built) -> None:
    model = str(built("llama"))
    order = Scores(
        "any", None, tuple(range(6)), {"x": CriterionScores("x", (), tuple(range(6)), known_order=tuple(range(6)))}
    )
    small = plan(model, scores=order, ratio=0.001)
    assert small.removed == ()
    assert "nothing is removed by --ratio 0.001: the first block has " in small.to_text()
    with pytest.raises(UsageError, match=r"--params 5.5B: the model has .* parameters"):
        plan(model, scores=order, params="5.5B")
    assert "nothing is removed" not in plan(model, scores=order, remove=0).to_text()


def test_a_plan_speaks_english(built: Built) -> None:
    assert "blocks are removed (" in plan(str(built("llama")), blocks="0,5").to_text()
    assert "), as given" in plan(str(built("llama")), blocks="0,5").to_text()
    with pytest.raises(ShortstackError, match="blocks 1, 3 are listed twice"):
        plan(str(built("llama")), blocks="1,1,3,3")


def test_protected_blocks_of_a_plan_cannot_go() -> None:
    with pytest.raises(ShortstackError, match="block 0 is protected"):
        PrunePlan("model", "", (0, 1, 2), (0,), protected=(0,))


@pytest.mark.parametrize(
    ("text", "number"), [("5.5B", 5_500_000_000), ("700M", 700_000_000), ("12", 12), ("1.5k", 1500)]
)
def test_amounts(text: str, number: int) -> None:
    assert parse_amount(text) == number


@pytest.mark.parametrize("text", ["", "5.5X", "-1", "1e9", "9" * 400, "²B"])
def test_bad_amounts(text: str) -> None:
    with pytest.raises(ShortstackError, match="is not a number of parameters"):
        parse_amount(text)


@given(st.lists(st.integers(0, 200), min_size=1, max_size=30, unique=True))
def test_any_list_of_blocks_is_read_back(blocks: list[int]) -> None:
    from shortstack.common.formatting import ranges

    assert parse_blocks(ranges(blocks)) == sorted(blocks)


@given(st.integers(1, 60), st.data())
def test_any_plan_keeps_what_it_must(depth: int, data: st.DataObject) -> None:
    blocks = tuple(range(depth))
    protected, _ = protected_blocks(blocks, data.draw(st.sampled_from([True, False, None])))
    free = [index for index in blocks if index not in protected]
    removed = data.draw(st.lists(st.sampled_from(free), unique=True, max_size=max(0, depth - 1))) if free else []
    if len(removed) == depth:
        removed = removed[1:]
    made = PrunePlan("model", "", blocks, tuple(sorted(removed)), protected=protected)
    assert set(made.kept) | set(made.removed) == set(blocks)
    assert not set(made.kept) & set(made.removed)
    assert set(protected) <= set(made.kept)
    assert made.kept == tuple(sorted(made.kept))
