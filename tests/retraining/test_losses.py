"""What is made small: by definition, and against the teacher's own gradients."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from shortstack.data.collators import collated, shifted
from shortstack.data.example_rows import Example
from shortstack.data.instructions import IGNORED
from shortstack.engine.stand_ins import find_blocks
from shortstack.retraining import losses as objectives
from shortstack.retraining.losses import Distillation, NextToken, full_kl, in_parts, top_k_kl
from tests import pico
from tests.families import tiny


def logits(seed: int, rows: int = 5, vocabulary: int = 11) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_is_its_definition(temperature: float) -> None:
    student, teacher = logits(0), logits(1)
    p = (teacher.double() / temperature).softmax(dim=-1)
    q = (student.double() / temperature).softmax(dim=-1)
    expected = float((p * (p / q).log()).sum()) * temperature**2
    assert float(full_kl(student, teacher, temperature=temperature)) == pytest.approx(expected, rel=1e-5)
    assert float(full_kl(student, student, temperature=temperature)) == 0.0


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), top_k=st.integers(1, 11), temperature=st.sampled_from([0.7, 1.0, 3.0]))
def test_top_tokens_alone_never_say_more(seed: int, top_k: int, temperature: float) -> None:
    student, teacher = logits(seed), logits(seed + 1)
    top = functional.log_softmax(teacher / temperature, dim=-1).topk(top_k, dim=-1)
    found = float(top_k_kl(student, top.indices, top.values, temperature=temperature))
    full = float(full_kl(student, teacher, temperature=temperature))
    assert -1e-4 <= found <= full * (1 + 1e-4) + 1e-4
    if top_k >= 11:
        assert found == pytest.approx(full, rel=1e-4)


def test_in_parts_is_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = logits(0, rows=50), logits(1, rows=50)
    whole = full_kl(student, teacher, temperature=1.0)
    monkeypatch.setattr(objectives, "_ROWS_AT_A_TIME", 7)
    assert float(in_parts(full_kl, student, teacher, temperature=1.0)) == pytest.approx(float(whole), rel=1e-6)


@pytest.fixture(scope="module")
def models(dense: Path, pruned: Path) -> tuple[Any, Any]:
    return pico.load(pruned), pico.load(dense)


def batch() -> dict[str, torch.Tensor]:
    ids = torch.tensor(pico.windows(2, 12))
    return {"input_ids": ids, "targets": shifted(ids)}


def test_next_token_is_the_models_own_loss(models: tuple[Any, Any]) -> None:
    student, _ = models
    given_batch = batch()
    ids = given_batch["input_ids"]
    with torch.no_grad():
        found = float(NextToken()(student, given_batch)["loss"]) / (2 * 11)
        expected = float(student(input_ids=ids, labels=ids).loss)
    assert found == pytest.approx(expected, rel=1e-6)


def test_padding_changes_nothing(models: tuple[Any, Any]) -> None:
    student, _ = models
    rows = [Example(ids, [IGNORED, *ids[1:]]) for ids in ([5, 6, 7, 8, 9], [10, 11, 12], list(range(20, 37)))]
    with torch.no_grad():
        together = float(NextToken()(student, collated(rows, 0))["loss"])
        apart = 0.0
        for row in rows:
            ids = torch.tensor([row.ids])
            apart += float(student(input_ids=ids, labels=ids).loss) * (len(row.ids) - 1)
    assert together == pytest.approx(apart, rel=1e-6)


def test_the_parts_add_up_with_their_weights(models: tuple[Any, Any], pruned: Path, dense: Path) -> None:
    student, teacher = models
    _, ours = find_blocks(student, tiny.open_checkpoint(pruned).anatomy)
    _, theirs = find_blocks(teacher, tiny.open_checkpoint(dense).anatomy)
    pairs = [(ours[place], theirs[original]) for place, original in enumerate((0, 1, 4, 5))]
    weights = {"kl_weight": 0.7, "loss_weight": 0.2, "hidden_weight": 0.3}
    objective = Distillation(temperature=2.0, teacher=teacher, block_pairs=pairs, **weights)  # type: ignore[arg-type]
    given_batch = batch()
    with torch.no_grad():
        parts = objective(student, given_batch)
        chosen = given_batch["targets"] != IGNORED
        logits_N = student(given_batch["input_ids"]).logits[chosen]
        taught_N = teacher(given_batch["input_ids"]).logits[chosen]
    assert float(parts["kl"]) == pytest.approx(float(full_kl(logits_N, taught_N, temperature=2.0)), rel=1e-5)
    expected = 0.7 * parts["kl"] + 0.2 * parts["nll"] + 0.3 * parts["hidden"]
    assert float(parts["loss"]) == pytest.approx(float(expected), rel=1e-6)
    # The first two blocks are unchanged and stand where they stood: no distance. The others lack two blocks' work.
    alone = Distillation(kl_weight=0, loss_weight=0, hidden_weight=1.0, teacher=teacher, block_pairs=pairs[:2])
    with torch.no_grad():
        assert float(alone(student, given_batch)["loss"]) == 0.0
    later = Distillation(kl_weight=0, loss_weight=0, hidden_weight=1.0, teacher=teacher, block_pairs=pairs[2:])
    with torch.no_grad():
        assert float(later(student, given_batch)["loss"]) > 0.1


def test_the_teacher_is_not_trained(models: tuple[Any, Any]) -> None:
    student, teacher = models
    Distillation(teacher=teacher)(student, batch())["loss"].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())
    student.zero_grad(set_to_none=True)


def test_a_model_that_is_its_own_teacher_has_nothing_to_learn(models: tuple[Any, Any]) -> None:
    student, _ = models
    with torch.no_grad():
        parts = Distillation(teacher=student, loss_weight=0)(student, batch())
    assert math.isclose(float(parts["loss"]), 0.0, abs_tol=1e-5)
