"""bi, update, kl, accept and ensemble against naive versions: hooks on the whole model, and the model without each block."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shortstack.data.calibration import CalibrationSet
from shortstack.engine import select
from shortstack.engine.block_model import NotSeparableError
from shortstack.errors import UsageError
from shortstack.families.open_model import open_checkpoint
from shortstack.scoring.criteria import CRITERIA, parse_criteria
from shortstack.scoring.criteria.ensemble import mean_ranks
from shortstack.scoring.score import score_windows
from tests import oracle, pico

Built = Callable[..., Path]
FAMILIES = ["llama", "falcon", "gemma2", "gpt2"]


@pytest.fixture(params=["streamed", "resident", "whole"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param != "whole":
        return request.param

    def refuse(checkpoint: Any, *_: Any) -> Any:
        raise NotSeparableError(checkpoint.source, "a test holds it whole")

    monkeypatch.setattr(select, "_streamed", refuse)
    return "auto"


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


def test_errors_are_named_by_what_they_are_of(built: Built) -> None:
    """Those of ppl are in NLL, those of the others in the score's own unit."""
    calibration = CalibrationSet(pico.windows(5), {})
    text = score_windows(open_checkpoint(built("llama")), calibration, parse_criteria("ppl,bi")).to_text()
    of_ppl, of_bi = text.split("bi: lowest")
    assert "s.e. (NLL)" in of_ppl
    assert "s.e." in of_bi
    assert "NLL" not in of_bi
