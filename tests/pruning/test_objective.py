"""What sets are chosen for: one definition of mean, worst and weights, in plans by scores and in searches."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shortstack.artifacts.scores import CriterionScores, Scores
from shortstack.errors import UsageError
from shortstack.families.open_model import open_checkpoint
from shortstack.pruning.curve import curve
from shortstack.pruning.objective import AddedCosts, Objective, parse_objective
from shortstack.pruning.plan import plan_for
from shortstack.pruning.search import search
from tests import oracle, pico

Built = Callable[..., Path]

# What each block adds to the NLL of two sources: cheap for the one, dear for the other.
GENERAL = [0.10, 0.30, 0.05, 0.02, 0.20, 0.40]
SUMS = [0.30, 0.10, 0.60, 0.90, 0.25, 0.40]
DENSE = {"general": 20.0, "sums": 5.0}


def ppl_scores(added: list[float], dense: float, **more: Any) -> CriterionScores:
    return CriterionScores(
        "ppl", tuple(dense * math.exp(one) for one in added), tuple(range(6)), (0.01,) * 6, dense, **more
    )


def scores_for(model: Path) -> Scores:
    sources = {"general": ppl_scores(GENERAL, DENSE["general"]), "sums": ppl_scores(SUMS, DENSE["sums"])}
    mean = [(one + other) / 2 for one, other in zip(GENERAL, SUMS, strict=True)]
    checkpoint = open_checkpoint(model)
    found = ppl_scores(mean, 10.0, sources=sources)
    calibration = {"source": "texts", "samples": 4, "seq_len": 16}
    return Scores(checkpoint.source, checkpoint.fingerprint, checkpoint.original_blocks, {"ppl": found}, calibration)


def of_sum(blocks: tuple[int, ...], objective: str) -> float:
    """The definition, once more."""
    general, sums = (sum(own[block] for block in blocks) for own in (GENERAL, SUMS))
    return {
        "mean": (general + sums) / 2,
        "worst": max(general / math.log(20), sums / math.log(5)),
        "general=3,sums=1": (3 * general + sums) / 4,
        "general=1": general,
    }[objective]


@pytest.mark.parametrize("objective", ["mean", "worst", "general=3,sums=1", "general=1"])
@pytest.mark.parametrize("remove", [1, 2, 3])
def test_a_plan_chooses_for_the_objective(built: Built, objective: str, remove: int) -> None:
    made = plan_for(
        open_checkpoint(built("llama")), scores=scores_for(built("llama")), remove=remove, objective=objective
    )
    removed = made.plan.removed
    sets = itertools.combinations(range(6), remove)
    assert removed == min(sets, key=lambda blocks: of_sum(blocks, objective))
    assert made.plan.why["objective"] == objective
    assert made.plan.why["sources"]["added_up"]["sums"] == pytest.approx(sum(SUMS[block] for block in removed))
    text = made.plan.to_text()
    assert f"the set is chosen for {objective}" in text
    [line] = [line for line in text.splitlines() if line.startswith("sums ")]
    assert line.split()[1] == f"{math.expm1(sum(SUMS[block] for block in removed)):+.1%}"


def test_the_objectives_choose_different_blocks(built: Built) -> None:
    chosen = {
        objective: plan_for(
            open_checkpoint(built("llama")), scores=scores_for(built("llama")), remove=2, objective=objective
        ).plan.removed
        for objective in ("mean", "worst", "general=1")
    }
    assert len(set(chosen.values())) == 3
    added = AddedCosts(scores_for(built("llama")).criterion("ppl"), Objective("worst"))
    worst = {objective: added.cost(removed) for objective, removed in chosen.items()}
    assert worst["worst"] < worst["mean"] < worst["general=1"]


def test_what_goes_next_depends_on_what_is_gone() -> None:
    """By its worst source alone block 1 is the second best; beside block 0, which hits the same one, block 2 costs less."""
    sources = {
        "a": CriterionScores(
            "ppl", tuple(math.exp(2 + one) for one in (0.10, 0.11, 0.0)), (0, 1, 2), None, math.exp(2)
        ),
        "b": CriterionScores("ppl", tuple(math.exp(2 + one) for one in (0.0, 0.0, 0.12)), (0, 1, 2), None, math.exp(2)),
    }
    found = CriterionScores("ppl", (8.0, 8.1, 8.2), (0, 1, 2), None, math.exp(2), sources=sources)
    assert AddedCosts(found, Objective("worst")).chosen().order == (0, 2, 1)
    assert AddedCosts(found, Objective("mean")).chosen().order == (0, 1, 2)
    assert AddedCosts(found, Objective("worst")).chosen([0]).order == (1, 2, 0)  # what stays takes no part


def test_a_contiguous_run_is_chosen_for_the_objective(built: Built) -> None:
    for objective in ("mean", "worst"):
        made = plan_for(
            open_checkpoint(built("llama")), scores=scores_for(built("llama")), remove=2, objective=objective,
            strategy="contiguous",
        )  # fmt: skip
        runs = [(block, block + 1) for block in range(5)]
        assert made.plan.removed == min(runs, key=lambda run: of_sum(run, objective))


@pytest.mark.parametrize(
    ("objective", "says"),
    [
        ("best", "--objective 'best': expected mean, worst, or weights"),
        ("general=two", "the weight of general is 'two', expected a number"),
        ("general=-1", "the weight of general is '-1', expected a number"),
        ("general=nan", "the weight of general is 'nan'"),
        ("general=0,sums=0", "all weights are 0"),
        ("general=1,general=2", "two weights of general"),
        ("code=1", r"no source has the name code \(sources: general, sums\)"),
    ],
)
def test_objectives_that_cannot_be_used(built: Built, objective: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as error:
        plan_for(open_checkpoint(built("llama")), scores=scores_for(built("llama")), remove=1, objective=objective)
    assert error.value.hint


def test_an_objective_needs_named_sources(built: Built) -> None:
    found = CriterionScores("ppl", tuple(range(1, 7)), tuple(range(6)))
    with pytest.raises(UsageError, match="the text has one source without a name"):
        AddedCosts(found, parse_objective("worst"))


def test_no_objective_is_as_before() -> None:
    found = CriterionScores("ppl", (3.0, 1.0, 2.0), (0, 1, 2))
    assert AddedCosts(found).chosen() is found
    assert parse_objective(None) is None


def texts(folder: Path) -> str:
    for name, word in (("general", "the cat sat "), ("sums", "1 + 2 = 3; ")):
        (folder / f"{name}.txt").write_text(word * 400)
    return f"general={folder / 'general.txt'},sums={folder / 'sums.txt'}"


def named_windows(data: str, samples: int) -> dict[str, list[list[int]]]:
    """Of each source, the windows that it has alone."""
    from shortstack.data.calibration import draw_windows
    from shortstack.data.sources import read_corpus

    pairs = [piece.split("=") for piece in data.split(",")]
    return {
        name: draw_windows(read_corpus(path, role="calibration"), pico.tokenizer(), samples=samples, seq_len=16).windows
        for name, path in pairs
    }


@torch.no_grad()
def nll(model: Path, windows: list[list[int]], removed: tuple[int, ...] = ()) -> float:
    return float(oracle.mean_nll(oracle.bypassed(pico.load(model), set(removed)), windows).mean())


@pytest.mark.parametrize("objective", ["worst", "mean", "general=1,sums=3"])
def test_a_search_measures_the_objective(built: Built, tmp_path: Path, objective: str) -> None:
    """Against the naive way: every pair of blocks measured on each source's own windows."""
    model, data = built("llama"), texts(tmp_path)
    found = search(
        str(model), data=data, samples=4, seq_len=16, remove=2, selection="beam:20", objective=objective,
        out=tmp_path / "plan.json",
    )  # fmt: skip
    windows = {name: own[:4] for name, own in named_windows(data, 8).items()}
    dense = {name: nll(model, own) for name, own in windows.items()}

    def cost(removed: tuple[int, ...]) -> float:
        added = {name: nll(model, own, removed) - dense[name] for name, own in windows.items()}
        weights = {"mean": (1, 1), "general=1,sums=3": (1, 3)}.get(objective)
        if weights is None:
            return max(added[name] / dense[name] for name in added)
        return (weights[0] * added["general"] + weights[1] * added["sums"]) / sum(weights)

    assert found.removed == min(itertools.combinations(range(6), 2), key=cost)
    why = json.loads((tmp_path / "plan.json").read_text())["why"]
    assert why["objective"] == objective
    judging = {name: own[4:] for name, own in named_windows(data, 8).items()}
    for name, own in judging.items():
        ratio = math.exp(nll(model, own, found.removed) - nll(model, own))
        assert why["measured"]["sets"][0]["sources"][name]["increase"] == pytest.approx(ratio - 1, abs=1e-4)
    assert "increase of perplexity for each source" in found.to_text()


def test_evolution_sees_all_sources_on_its_first_windows(built: Built, tmp_path: Path) -> None:
    found = search(
        str(built("llama")),
        data=texts(tmp_path),
        samples=4,
        seq_len=16,
        remove=2,
        selection="evolution:3",
        objective="worst",
    )
    assert len(found.removed) == 2


def test_a_curve_has_the_sources(built: Built, tmp_path: Path) -> None:
    found = curve(
        str(built("llama")),
        out=tmp_path / "curve.json",
        data=texts(tmp_path),
        samples=2,
        seq_len=16,
        most=2,
        objective="worst",
    )
    record = json.loads((tmp_path / "curve.json").read_text())
    assert [list(point["sources"]) for point in record["points"]] == [["general", "sums"]] * 2
    assert record["why"]["objective"] == "worst"
    assert "change of each source's perplexity" in found.to_text()


def test_an_objective_that_names_no_source_is_refused_by_a_search(built: Built, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no source has the name code"):
        search(str(built("llama")), data=texts(tmp_path), samples=2, seq_len=16, remove=1, objective="code=1")
    with pytest.raises(UsageError, match="the text has one source without a name"):
        search(str(built("llama")), data=str(tmp_path / "sums.txt"), samples=2, seq_len=16, remove=1, objective="worst")
