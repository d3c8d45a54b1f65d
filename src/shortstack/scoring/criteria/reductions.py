"""From the saliences of single weights to one number per tensor and per block, as published."""

from __future__ import annotations

import torch

from shortstack.scoring.criteria import Reduction


def tensor_score(salience: torch.Tensor, *, power: int, output_dim: int, reduction: Reduction) -> torch.Tensor:
    """Score of one tensor, a number where the weights are.

    |salience|^power, summed over input dimensions, then reduced over output rows.

    Args:
        salience: one number per weight, any shape; a vector is its own output rows.
        power: 1 or 2.
        output_dim: the dimension of the output rows.
        reduction: over the output rows; sums and products are formed in float64.
    """
    powered = salience.abs() if power == 1 else salience.square()
    others = [dim for dim in range(salience.ndim) if dim != output_dim]
    rows = powered.sum(dim=others, dtype=torch.float64) if others else powered.double()
    return _reduced(rows, reduction)


def block_score(tensor_scores: list[float], reduction: Reduction) -> float:
    """Score of a block from those of its tensors."""
    return float(_reduced(torch.tensor(tensor_scores, dtype=torch.float64), reduction))


def _reduced(values: torch.Tensor, reduction: Reduction) -> torch.Tensor:
    if reduction == "sum":
        return values.sum()
    if reduction == "mean":
        return values.mean()
    return values.max() if reduction == "max" else values.prod()
