"""Which blocks are trained, towards what, by which loss, and how one is: math apart from the run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shortstack.retraining.local_blocks import BlockTraining, StateLoss, near_cuts, target_depths
from shortstack.retraining.options import Hyperparameters


def hyperparameters(**changed: Any) -> Hyperparameters:
    chosen: dict[str, Any] = {
        "method": "local", "train": "all", "learning_rate": 1e-2, "schedule": "cosine", "warmup_steps": 4, "batch": 1,
        "micro_batch": 1, "seq_len": 8, "keep": "last", "local": {"lora_rank": None},
    }  # fmt: skip
    return Hyperparameters(**{**chosen, **changed})


@st.composite
def cuts(draw: st.DrawFn) -> tuple[list[int], int]:
    depth = draw(st.integers(2, 12))
    kept = draw(st.sets(st.integers(0, depth - 1), min_size=1, max_size=depth - 1))
    return sorted(kept), depth


@given(cuts())
def test_targets_rise_to_the_end_and_every_block_is_given_what_it_was_given(made: tuple[list[int], int]) -> None:
    kept, depth = made
    goals = target_depths(kept, depth)
    assert goals[-1] == depth
    for position, goal in enumerate(goals[:-1]):
        assert goal == kept[position + 1]  # all dense blocks before the next surviving one
    assert all(goal > own for own, goal in zip(kept, goals, strict=True))


@given(cuts(), st.integers(1, 4))
def test_blocks_near_a_cut_are_those_within_the_radius(made: tuple[list[int], int], radius: int) -> None:
    kept, depth = made
    removed = set(range(depth)) - set(kept)
    found = near_cuts(kept, depth, radius)
    assert near_cuts(kept, depth, None) == list(range(len(kept)))
    for position in range(len(kept)):
        span = kept[max(0, position - radius + 1) : position + radius]  # surviving blocks within the radius
        first = span[0] if position - radius + 1 > 0 else -1
        last = span[-1] if position + radius - 1 < len(kept) - 1 else depth
        left = kept[position - radius] if position >= radius else -1
        right = kept[position + radius] if position + radius < len(kept) else depth
        near = any(left < index < right for index in removed)
        assert (position in found) == near, (kept, depth, radius, position, first, last)


def test_the_loss_is_relative_and_a_sum_over_tokens() -> None:
    theirs = torch.randn(5, 8, dtype=torch.float64)
    before, ours = torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    found = StateLoss(0.5, 2.0)(ours, theirs, before)
    state = sum(float(((o - t) ** 2).sum() / (t**2).sum()) for o, t in zip(ours, theirs, strict=True))
    update = sum(
        float(((o - t) ** 2).sum() / ((t - b) ** 2).sum()) for o, t, b in zip(ours, theirs, before, strict=True)
    )
    cosine = sum(float(1 - o @ t / (o.norm() * t.norm())) for o, t in zip(ours, theirs, strict=True))
    assert float(found["state"]) == pytest.approx(state, rel=1e-5)
    assert float(found["update"]) == pytest.approx(update, rel=1e-5)
    assert float(found["cosine"]) == pytest.approx(cosine, rel=1e-5)
    assert float(found["loss"]) == pytest.approx(state + 0.5 * update + 2.0 * cosine, rel=1e-5)
    assert StateLoss()(ours, theirs, None).keys() == {"loss", "state"}


def linear() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.LayerNorm(6))


def step_towards_zero(training: BlockTraining, step: int) -> float:
    with torch.enable_grad():
        given = torch.func.functional_call(training.block, training.weights(), (torch.ones(3, 6),))
        given.square().sum().backward()
    return training.update(step)


def test_an_adapter_starts_from_the_block_and_changes_its_matrices_by_its_rank() -> None:
    block = linear()
    before = {name: value.detach().clone() for name, value in block.named_parameters()}
    training = BlockTraining(block, hyperparameters(local={"lora_rank": 2}), 5, torch.Generator().manual_seed(0))
    for name, value in training.weights().items():
        assert torch.equal(value, before[name]), name
    for step in range(5):
        step_towards_zero(training, step)
    change = training.weights()["0.weight"] - before["0.weight"]
    assert torch.linalg.matrix_rank(change.detach(), rtol=1e-4) == 2
    for name in ("0.bias", "1.weight", "1.bias"):
        assert torch.equal(training.weights()[name], before[name])


@pytest.mark.parametrize("rank", [None, 2])
def test_it_resumes_bit_for_bit(rank: int | None) -> None:
    def training() -> BlockTraining:
        return BlockTraining(linear(), hyperparameters(local={"lora_rank": rank}), 6, torch.Generator().manual_seed(1))

    whole, part, rest = training(), training(), training()
    for step in range(6):
        step_towards_zero(whole, step)
    for step in range(3):
        step_towards_zero(part, step)
    rest.restore(*part.saved())
    for step in range(3, 6):
        step_towards_zero(rest, step)
    for name, value in whole.weights().items():
        assert torch.equal(value, rest.weights()[name]), name


def test_the_rate_rises_then_falls_to_nothing() -> None:
    training = BlockTraining(linear(), hyperparameters(), 24, torch.Generator())
    rates = [training.rate(step) for step in range(25)]
    assert rates[:5] == sorted(rates[:5])
    assert rates[4] == max(rates) == 1e-2
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[14] == pytest.approx(0.5e-2)
    assert rates[24] == pytest.approx(0.0, abs=1e-12)
    assert all(math.isfinite(rate) for rate in rates)


def test_large_gradients_are_cut() -> None:
    training = BlockTraining(linear(), hyperparameters(), 4, torch.Generator())
    for leaf in training.leaves.values():
        leaf.grad = torch.full_like(leaf, 100.0)
    assert training.update(0) > 1.0
    assert all(leaf.grad is None for leaf in training.leaves.values())
