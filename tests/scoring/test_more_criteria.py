"""The criteria of hidden states and logits against naive versions: hooks on the whole model, the model without each block."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shortstack.artifacts.scores import load_scores
from shortstack.data.calibration import CalibrationSet
from shortstack.engine import whole_model
from shortstack.engine.journal import Journal
from shortstack.errors import ShortstackError, UsageError
from shortstack.families.open_model import open_checkpoint
from shortstack.pruning.plan import plan_for
from shortstack.scoring.criteria import CRITERIA, parse_criteria
from shortstack.scoring.criteria.angular import angle
from shortstack.scoring.criteria.cluster import how_many, order_of, spectral
from shortstack.scoring.criteria.ensemble import mean_ranks
from shortstack.scoring.score import score_windows
from tests import oracle, pico

Built = Callable[..., Path]
FAMILIES = ["llama", "falcon", "gemma2", "gpt2"]


def scored(model: Path, criteria: str, **options: Any) -> dict[str, Any]:
    calibration = CalibrationSet(pico.windows(5), {})
    return score_windows(open_checkpoint(model), calibration, parse_criteria(criteria), **options).criteria


@torch.no_grad()
def states(model: Path, ids_BT: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What goes into each block and comes out of it, in float64, as a hook sees it: never after the final norm."""
    loaded, found = pico.load(model), []

    def note(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        left = output[0] if isinstance(output, tuple) else output
        found.append(((args[0] if args else kwargs["hidden_states"]).double(), left.double()))

    for block in oracle.layers_of(loaded):
        block.register_forward_hook(note, with_kwargs=True)
    loaded(input_ids=ids_BT, use_cache=False)
    return found


@torch.no_grad()
def predictions(model: Path, removed: set[int], ids_BT: torch.Tensor) -> torch.Tensor:
    """Probabilities at the positions whose next token is in the window, in float64."""
    logits = oracle.bypassed(pico.load(model), removed)(input_ids=ids_BT, use_cache=False).logits
    return logits.double().softmax(dim=-1)[:, :-1]  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("first", [0, 1])
def test_hidden_states_criteria_equal_naive_ones(built: Built, family: str, memory: Any, first: int) -> None:
    model, ids = built(family), torch.tensor(pico.windows(5))
    suffix = ":first_token=skip" if first else ""
    found = scored(model, f"bi{suffix},update{suffix}", memory=memory)
    influence, update = [], []
    for given, left in states(model, ids):
        cosine = (given * left).sum(-1) / given.norm(dim=-1) / left.norm(dim=-1)
        influence.append(float((1 - cosine)[:, first:].mean()))
        update.append(float(((left - given).norm(dim=-1) / given.norm(dim=-1))[:, first:].mean()))
    assert list(found[f"bi{suffix}"].scores) == pytest.approx(influence, rel=1e-4)
    assert list(found[f"update{suffix}"].scores) == pytest.approx(update, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_criteria_equal_naive_ones(built: Built, family: str, memory: Any) -> None:
    model, ids = built(family), torch.tensor(pico.windows(5))
    found = scored(model, "kl,accept", memory=memory)
    dense = predictions(model, set(), ids)
    divergence, rejected = [], []
    for index in range(len(found["kl"].scores)):
        without = predictions(model, {index}, ids)
        divergence.append(float((dense * (dense.log() - without.log())).sum(-1).mean()))
        rejected.append(float(1 - torch.minimum(dense, without).sum(-1).mean()))
    assert list(found["kl"].scores) == pytest.approx(divergence, rel=1e-4)
    assert list(found["accept"].scores) == pytest.approx(rejected, rel=1e-4)


def test_errors_are_those_of_means_over_windows(built: Built) -> None:
    model, windows = built("llama"), pico.windows(5)
    found = scored(model, "bi,kl")
    alone = [
        score_windows(open_checkpoint(model), CalibrationSet([window], {}), parse_criteria("bi,kl")).criteria
        for window in windows
    ]
    for name in ("bi", "kl"):
        of_windows = torch.tensor([one[name].scores for one in alone], dtype=torch.float64)
        assert list(found[name].scores) == pytest.approx(of_windows.mean(dim=0).tolist(), rel=1e-4)
        assert list(found[name].stderr) == pytest.approx((of_windows.std(dim=0) / 5**0.5).tolist(), rel=1e-3)
        assert alone[0][name].stderr is None


def test_states_are_those_before_the_final_norm(built: Built) -> None:
    """The list of states that a model returns ends with one after the norm, on which the last block is another."""
    model, ids = built("llama"), torch.tensor(pico.windows(5))
    with torch.no_grad():
        returned = pico.load(model)(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    normed = 1 - torch.nn.functional.cosine_similarity(returned[-2].double(), returned[-1].double(), dim=-1).mean()
    assert scored(model, "bi")["bi"].scores[-1] != pytest.approx(float(normed), rel=0.01)


def test_half_precision_states_are_compared_in_float32(built: Built) -> None:
    """1 - cosine of nearly equal states is all rounding in bfloat16: 0, or steps of 2^-8."""
    model = built("llama")
    exact, half = scored(model, "bi")["bi"].scores, scored(model, "bi", dtype="bfloat16")["bi"].scores
    assert list(half) == pytest.approx(list(exact), rel=0.1)
    assert all(score * 256 != round(score * 256) for score in half)


def test_ensemble_is_the_mean_rank(built: Built) -> None:
    found = scored(built("llama"), "ensemble,ppl,magnitude,bi")
    assert list(found) == ["ensemble", "ppl", "magnitude", "bi"]
    ranks = [[sorted(found[name].scores).index(x) for x in found[name].scores] for name in ("ppl", "magnitude", "bi")]
    assert list(found["ensemble"].scores) == pytest.approx([sum(three) / 3 for three in zip(*ranks, strict=True)])


def test_equal_scores_share_a_rank() -> None:
    assert mean_ranks((3.0, 1.0, 1.0, 2.0)) == [3.0, 0.5, 0.5, 2.0]


@pytest.mark.parametrize("criteria", ["ensemble", "ppl,ensemble"])
def test_ensemble_needs_two_others(criteria: str) -> None:
    with pytest.raises(UsageError, match="ensemble needs at least two other criteria"):
        parse_criteria(criteria)


def test_all_is_every_criterion(built: Built) -> None:
    assert list(scored(built("llama"), "all")) == list(CRITERIA)


def test_gates_are_no_criterion_and_the_hint_says_where_they_are() -> None:
    with pytest.raises(UsageError, match="unknown criterion 'gate'") as refused:
        parse_criteria("ppl,gate")
    assert "--selection gate:32" in (refused.value.hint or "")


def test_errors_are_named_by_what_they_are_of(built: Built) -> None:
    """Those of ppl are in NLL, those of the others in the score's own unit."""
    calibration = CalibrationSet(pico.windows(5), {})
    text = score_windows(open_checkpoint(built("llama")), calibration, parse_criteria("ppl,bi")).to_text()
    of_ppl, of_bi = text.split("bi: lowest")
    assert "s.e. (NLL)" in of_ppl
    assert "s.e." in of_bi
    assert "NLL" not in of_bi


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("name", "run", "last"), [("angular", 1, True), ("angular:n=3,tokens=all", 3, False)])
def test_angles_equal_naive_ones(built: Built, family: str, memory: Any, name: str, run: int, last: bool) -> None:
    model, ids = built(family), torch.tensor(pico.windows(5))
    found = scored(model, name, memory=memory)[name]
    at = [given for given, _ in states(model, ids)] + [states(model, ids)[-1][1]]
    expected = []
    for begin in range(6 - run + 1):
        before, after = (at[place][:, -1:] if last else at[place] for place in (begin, begin + run))
        cosine = (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)
        expected.append(float(cosine.clamp(-1, 1).arccos().mean() / torch.pi))
    assert found.blocks == tuple(range(6 - run + 1))
    assert list(found.scores) == pytest.approx(expected, rel=1e-4)


def test_states_beside_gradients_and_branches_are_the_same(built: Built, memory: Any) -> None:
    """Kept inputs serve both, and graphs that are kept for gradients do not change them."""
    model, names = built("llama"), "ppl,taylor,kl,angular,cluster"
    found = scored(model, names, memory=memory)
    for name in names.split(","):
        alone = scored(model, name, memory=memory)[name]
        assert list(found[name].scores) == pytest.approx(list(alone.scores), rel=1e-5)


def test_an_angle_of_nearly_equal_states_is_not_lost_in_rounding() -> None:
    first = torch.tensor([[[1.0, 0.0]]])
    for small in (1e-3, 1e-5, 1e-7):
        second = torch.tensor([[[1.0, small]]])
        assert float(angle(first, second)) == pytest.approx(small / torch.pi, rel=1e-3)


def test_a_run_longer_than_the_model(built: Built) -> None:
    with pytest.raises(ShortstackError, match="no run of 7 blocks fits"):
        scored(built("llama"), "angular:n=7")


def test_scores_of_runs_choose_a_run(built: Built) -> None:
    model = built("llama")
    calibration = CalibrationSet(pico.windows(5), {})
    found = score_windows(open_checkpoint(model), calibration, parse_criteria("angular:n=3"))
    one = found.criteria["angular:n=3"]
    begin = min(range(4), key=lambda place: one.scores[place])
    made = plan_for(open_checkpoint(model), scores=found, remove=3, strategy="contiguous").plan
    assert made.removed == (begin, begin + 1, begin + 2)
    for options in ({"remove": 3}, {"remove": 2, "strategy": "contiguous"}):
        with pytest.raises(UsageError, match="scores runs of 3 adjacent blocks") as caught:
            plan_for(open_checkpoint(model), scores=found, **options)  # type: ignore[arg-type]
        assert "3" in (caught.value.hint or "")


def test_scores_of_runs_are_read_back(built: Built, tmp_path: Path) -> None:
    calibration = CalibrationSet(pico.windows(5), {})
    found = score_windows(open_checkpoint(built("llama")), calibration, parse_criteria("angular:n=3,ppl"))
    found.save(tmp_path / "scores.json")
    assert load_scores(tmp_path / "scores.json").criteria["angular:n=3"].run == 3
    assert load_scores(tmp_path / "scores.json").criteria["ppl"].run == 1


def groups(*sizes: int, within: float = 0.95, between: float = 0.1) -> torch.Tensor:
    """Similarities of blocks in groups of these sizes."""
    of = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    alike = torch.where(of[:, None] == of[None], within, between)
    alike.fill_diagonal_(1.0)
    return alike.double()


def test_clusters_are_the_groups() -> None:
    found = spectral(groups(3, 4, 5), 3)
    assert [len(set(found[start:stop])) for start, stop in ((0, 3), (3, 7), (7, 12))] == [1, 1, 1]
    assert len(set(found)) == 3


@pytest.mark.parametrize(("mean", "clusters"), [(0.2, 2), (0.5, 2), (0.55, 3), (0.61, 3), (0.63, 4), (0.99, 4)])
def test_how_many_clusters_follows_from_the_mean_similarity(mean: float, clusters: int) -> None:
    alike = torch.full((8, 8), mean, dtype=torch.float64)
    alike.fill_diagonal_(1.0)
    assert how_many(alike) == clusters


def test_what_is_most_alike_goes_first_and_one_of_each_kind_stays() -> None:
    alike = groups(3, 4, 5)
    alike[3:7, 3:7] = 0.99  # the second group is the most alike
    order = order_of(alike, [0] * 3 + [1] * 4 + [2] * 5)
    assert set(order[:3]) < {3, 4, 5, 6}
    assert sorted(order) == list(range(12))
    assert set(order[-2:]) == {0, 11}
    last_inner = order[-5:-2]
    assert len({0 if place < 3 else 1 if place < 7 else 2 for place in last_inner}) == 3


def test_cluster_gives_the_places_of_its_order(built: Built, memory: Any) -> None:
    model, ids = built("llama"), torch.tensor(pico.windows(5))
    given = [state for state, _ in states(model, ids)]
    alike = torch.stack(
        [torch.stack([torch.cosine_similarity(one, other, dim=-1).mean() for other in given]) for one in given]
    )
    order = order_of(alike, spectral(alike, how_many(alike)))
    found = scored(model, "cluster", memory=memory)["cluster"]
    assert list(found.order) == order
    assert sorted(found.scores) == list(map(float, range(6)))


@pytest.mark.parametrize("after", [1, 2, 3])
def test_states_of_a_run_that_was_cut_off(built: Built, tmp_path: Path, memory: Any, after: int) -> None:
    """A run can resume from every saved state: what criteria have seen of states is neither lost nor counted twice."""
    names, calibration = "angular:n=2,cluster,taylor,bi", CalibrationSet(pico.windows(5), {})
    model = open_checkpoint(built("llama"))
    whole = score_windows(model, calibration, parse_criteria(names), memory=memory)
    saves, real = [], Journal.save

    def save(self: Journal, *arguments: Any) -> None:
        real(self, *arguments)
        saves.append(1)
        if len(saves) == after:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "save", save)
        patch.setattr(Journal, "due", lambda self: True)
        patch.setattr(whole_model, "TOKENS_AT_A_TIME", {"cpu": 32})  # two windows at a time
        with pytest.raises(KeyboardInterrupt):
            score_windows(model, calibration, parse_criteria(names), memory=memory, work_folder=tmp_path)
    again = score_windows(model, calibration, parse_criteria(names), memory=memory, work_folder=tmp_path)
    for name in names.split(","):
        assert list(again.criteria[name].scores) == pytest.approx(list(whole.criteria[name].scores), rel=1e-6)
