"""Losses from logits, and from what goes into the head: whole, in slices, with entries that can never be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shortstack.engine.block_model import Skeleton
from shortstack.engine.losses import head_nll, token_nll
from shortstack.families.open_model import open_checkpoint

Built = Callable[..., Path]
CPU = torch.device("cpu")


@pytest.mark.parametrize("at_once", [1, 40, 64, 10**6])
@pytest.mark.parametrize("bias", ["none", "random", "impossible"])
def test_slices_of_the_vocabulary_give_the_loss_of_the_whole(at_once: int, bias: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = 3 * torch.randn(2, 5, 16, generator=generator)
    weight = torch.randn(23, 16, generator=generator)
    bias_V = None if bias == "none" else torch.randn(23, generator=generator)
    ids = torch.randint(0, 9, (2, 5), generator=generator)
    if bias == "impossible" and bias_V is not None:
        bias_V[12:] = -torch.inf  # as a padded vocabulary is masked: whole slices of it
    logits = torch.nn.functional.linear(hidden, weight, bias_V)
    torch.testing.assert_close(
        head_nll(hidden, weight, bias_V, ids, at_once), token_nll(logits, ids), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(("family", "linear"), [("llama", True), ("gpt2", True), ("gemma2", False)])
def test_a_head_is_taken_apart_only_where_it_gives_the_logits(built: Built, family: str, linear: bool) -> None:
    """gemma2 caps its logits: there the model's own forward makes them."""
    skeleton = Skeleton(open_checkpoint(built(family)), dtype=torch.float32, device=CPU)
    ids = torch.arange(2, 26).view(2, 12)
    with torch.no_grad():
        hidden = 2 * torch.randn(*ids.shape, skeleton.first_hidden(ids).shape[-1])
        found = skeleton.head.nll(hidden, ids)
        assert (skeleton.head.linear is not None) == linear
        torch.testing.assert_close(found, token_nll(skeleton.logits(hidden, ids), ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_gradient_of_the_loss_is_autograds(built: Built, family: str) -> None:
    """In closed form where the head is linear; through the model's own forward where it is not."""
    skeleton = Skeleton(open_checkpoint(built(family)), dtype=torch.float32, device=CPU)
    ids = torch.arange(2, 26).view(2, 12)
    scale = torch.tensor([0.3, 0.7], dtype=torch.float64)
    hidden = skeleton.first_hidden(ids).clone().requires_grad_(True)
    (token_nll(skeleton.logits(hidden, ids), ids).sum(dim=1) * scale).sum().backward()
    torch.testing.assert_close(
        skeleton.head.nll_gradient(hidden.detach(), ids, scale), hidden.grad, rtol=1e-4, atol=1e-7
    )
