"""The published procedures, done naively on the whole model: what shortstack's scores must equal."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests import pico


def layers_of(model: Any) -> nn.ModuleList:
    """The list of blocks: the longest ModuleList of the model."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len)


def mean_nll(model: Any, windows: list[list[int]]) -> torch.Tensor:
    """Mean NLL of each window, one forward per window, from the definition."""
    losses = []
    for window in windows:
        ids = torch.tensor([window])
        log_probabilities = torch.log_softmax(model(ids, use_cache=False).logits[0, :-1].double(), dim=-1)
        losses.append(-log_probabilities[torch.arange(len(window) - 1), ids[0, 1:]].mean())
    return torch.stack(losses)


@torch.no_grad()
def bypassed(model: Any, removed: set[int]) -> Any:
    """The same model with blocks bypassed."""

    def skip(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    for index in removed:
        layers_of(model)[index].register_forward_hook(skip, with_kwargs=True)
    return model


@torch.no_grad()
def ppl_without_each(directory: Path, windows: list[list[int]]) -> list[float]:
    depth = len(layers_of(pico.load(directory)))
    return [math.exp(mean_nll(bypassed(pico.load(directory), {i}), windows).mean()) for i in range(depth)]


@torch.no_grad()
def dense_ppl(directory: Path, windows: list[list[int]]) -> float:
    return math.exp(mean_nll(pico.load(directory), windows).mean())


def scored(block: nn.Module) -> dict[str, nn.Parameter]:
    """Matrices and norm weights, by what they are: no bias, no sink, no state matrix."""
    found = {}
    for name, parameter in block.named_parameters():
        module = block.get_submodule(name.rpartition(".")[0])
        is_norm = "norm" in type(module).__name__.lower()
        excluded = name.endswith("bias") or name.rpartition(".")[2] in ("A_log", "D", "sinks")
        if not excluded and (parameter.ndim >= 2 or (is_norm and name.endswith("weight"))):
            found[name] = parameter
    return found


def taylor(
    directory: Path, windows: list[list[int]], *, power: int = 1, batch: int | None = None
) -> list[dict[str, float]]:
    """|sum over batches of w * g|^p summed over elements, per block and tensor: autograd on the whole model."""
    model = pico.load(directory)
    blocks = layers_of(model)
    salience: list[dict[str, torch.Tensor]] = [
        {name: torch.zeros_like(p) for name, p in scored(b).items()} for b in blocks
    ]
    size = batch or len(windows)
    for start in range(0, len(windows), size):
        model.zero_grad()
        mean_nll(model, windows[start : start + size]).mean().backward()
        for total, block in zip(salience, blocks, strict=True):
            for name, parameter in scored(block).items():
                assert parameter.grad is not None
                total[name] += (parameter * parameter.grad).detach()
    return [{name: float((s.abs() ** power).double().sum()) for name, s in total.items()} for total in salience]


@torch.no_grad()
def magnitude(directory: Path, *, power: int = 1) -> list[dict[str, float]]:
    blocks = layers_of(pico.load(directory))
    return [{name: float((p.abs() ** power).double().sum()) for name, p in scored(block).items()} for block in blocks]
