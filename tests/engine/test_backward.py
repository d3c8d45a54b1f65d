"""Gradient and Hessian of the loss over gates on the blocks' updates equal those of autograd on the whole model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from shortstack.engine import select
from shortstack.engine.block_model import NotSeparableError
from shortstack.engine.interface import Engine, Windows
from shortstack.engine.select import EngineOptions, choose_engine
from shortstack.engine.stand_ins import find_blocks
from shortstack.families.open_model import open_checkpoint
from shortstack.scoring.search.gates import quadratic_model
from shortstack.scoring.shared_windows import SharedWindows
from tests import pico

Built = Callable[..., Path]
WINDOWS = pico.windows(3)
FAMILIES = ["llama", "gpt2", "qwen3", "gpt_neox"]


@contextlib.contextmanager
def engine_of(model: Path, tokens: int | None = None) -> Iterator[Engine]:
    options = EngineOptions(torch.float32, torch.device("cpu"), tokens=tokens)
    with contextlib.closing(choose_engine(open_checkpoint(model), WINDOWS, options)) as engine:
        yield engine


def naive_loss(model_path: Path) -> tuple[Callable[[torch.Tensor], torch.Tensor], int]:
    """The mean NLL as a function of the gates, of the whole model in float64."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float64, attn_implementation="eager").eval()
    _, blocks = find_blocks(model, open_checkpoint(model_path).anatomy)
    gates: list[torch.Tensor] = []

    def gated(index: int) -> Callable[..., Any]:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            came = args[0] if args else kwargs["hidden_states"]
            left = output[0] if isinstance(output, tuple) else output
            result = came + gates[-1][index] * (left - came)
            return (result, *output[1:]) if isinstance(output, tuple) else result

        return hook

    for index, block in enumerate(blocks):
        block.register_forward_hook(gated(index), with_kwargs=True)
    ids = torch.tensor(WINDOWS)

    def loss(gates_N: torch.Tensor) -> torch.Tensor:
        gates.append(gates_N)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    return loss, len(blocks)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_those_of_autograd(built: Built, family: str, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if whole:

        def not_separable(checkpoint: Any, *_: Any) -> Any:
            raise NotSeparableError(checkpoint.source, "for a test")

        monkeypatch.setattr(select, "_streamed", not_separable)
    model = built(family)
    loss, depth = naive_loss(model)
    ones = torch.ones(depth, dtype=torch.float64)
    gradient = torch.autograd.functional.jacobian(loss, ones)
    hessian = torch.autograd.functional.hessian(loss, ones)
    with engine_of(model) as engine:
        assert bool(engine.reason) == whole
        found = quadratic_model(engine, range(depth), text=SharedWindows(WINDOWS))
    assert torch.allclose(found.gradient_N, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))
    assert torch.allclose(found.hessian_NN, hessian, rtol=1e-2, atol=3e-3 * float(hessian.abs().max()))


def test_some_blocks_and_few_tokens_at_a_time_give_the_same(built: Built) -> None:
    """A block whose gate stays 1 has no row; windows in parts add up."""
    model = built("llama")
    with engine_of(model) as engine:
        whole = quadratic_model(engine, range(6), text=SharedWindows(WINDOWS))
    with engine_of(model, tokens=16) as engine:
        some = quadratic_model(engine, [4, 1], text=SharedWindows(WINDOWS))
    assert some.candidates == (1, 4)
    assert torch.allclose(some.gradient_N, whole.gradient_N[[1, 4]], rtol=1e-4, atol=1e-6)
    largest = float(whole.hessian_NN.abs().max())
    assert torch.allclose(some.hessian_NN, whole.hessian_NN[[1, 4]][:, [1, 4]], atol=2e-3 * largest)


def test_gates_that_are_zero_are_removals(built: Built) -> None:
    """The loss that is differentiated is the one that removal changes."""
    loss, depth = naive_loss(built("llama"))
    gates = torch.ones(depth, dtype=torch.float64)
    gates[2] = 0
    with engine_of(built("llama")) as engine:
        removed = float(engine.nll_without(Windows.of(WINDOWS), [frozenset({2})]).mean())
    assert loss(gates).item() == pytest.approx(removed, rel=1e-5)


def test_only_tokens_that_count_do(built: Built) -> None:
    """The loss over some tokens is that of autograd over them."""
    counted = [[column % 3 > 0 for column in range(16)] for _ in WINDOWS]
    text = SharedWindows(WINDOWS, counted=counted)
    model = AutoModelForCausalLM.from_pretrained(built("llama"), dtype=torch.float32).eval()
    update = {}
    block = model.model.layers[3]
    gate = torch.ones(1, requires_grad=True)
    block.register_forward_hook(lambda _, args, output: update.setdefault("out", args[0] + gate * (output - args[0])))
    ids, which = torch.tensor(WINDOWS), torch.tensor(counted)[:, 1:]
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits[which], ids[:, 1:][which]).backward()
    assert gate.grad is not None
    with engine_of(built("llama")) as engine:
        found = quadratic_model(engine, [3], text=text)
    assert found.gradient_N.item() == pytest.approx(gate.grad.item(), rel=1e-3)
