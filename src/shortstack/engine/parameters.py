"""Which parameters of a block are scored, and how their elements are arranged."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

# Never scored, whatever their shape: not weights of a linear map or a norm.
_NEVER = ("A_log", "D", "sinks")


@dataclass(frozen=True)
class ScoredParameter:
    """A parameter that criteria score.

    Attributes:
        name: within the block.
        output_dim: the dimension of its output rows; the others are summed over first. A norm weight has only this one.
    """

    name: str
    output_dim: int


def scored_parameters(block: nn.Module) -> list[ScoredParameter]:
    """Every parameter of two or more dimensions and every norm weight; never biases, sinks, A_log, D.

    For Llama-like blocks: the seven linear weights and the two norm weights, as published.
    """
    found = []
    for name, parameter in block.named_parameters():
        owner_name, _, last = name.rpartition(".")
        kind = type(block.get_submodule(owner_name)).__name__
        if last in _NEVER or "bias" in last:
            continue
        if parameter.ndim >= 2:
            # transformers' Conv1D (GPT-2) keeps its matrix as [input, output], everything else as [output, input].
            found.append(ScoredParameter(name, parameter.ndim - 1 if kind == "Conv1D" else 0))
        elif last == "weight" and "norm" in kind.lower():
            found.append(ScoredParameter(name, 0))
    return found
