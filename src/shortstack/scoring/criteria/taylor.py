"""taylor: |weight x gradient| summed over a block (Shortened LLaMA): the first-order change of the loss.

Needs backward.
"""

from __future__ import annotations

import torch

from shortstack.scoring.criteria import Criterion
from shortstack.scoring.criteria.reductions import tensor_score


def salience(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """w * g elementwise, in float32 at least.

    `gradient` must be complete: the absolute value of a sum is not the sum of absolute values.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(wide) * gradient.to(wide)


def loss_scale(windows: int, seq_len: int, batch: int | None) -> torch.Tensor:
    """What each window's summed NLL is multiplied by, so that the gradient is the sum of those of the batches' means.

    Args:
        batch: windows per batch, each with its own mean loss; None for one mean over all.
    """
    size = batch or windows
    sizes = [min(size, windows - start) for start in range(0, windows, size) for _ in range(min(size, windows - start))]
    return torch.tensor([1.0 / (count * (seq_len - 1)) for count in sizes], dtype=torch.float64)


def score(criterion: Criterion, weight: torch.Tensor, gradient: torch.Tensor, output_dim: int) -> torch.Tensor:
    """Score of one tensor, as a number where the weights are."""
    return tensor_score(
        salience(weight, gradient), power=criterion.power, output_dim=output_dim, reduction=criterion.weight_reduction
    )
