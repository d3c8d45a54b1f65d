"""magnitude: |weight| summed over a block (Shortened LLaMA's baseline). Needs nothing but the weights."""

from __future__ import annotations

import torch

from shortstack.scoring.criteria import Criterion
from shortstack.scoring.criteria.reductions import tensor_score


def score(criterion: Criterion, weight: torch.Tensor, output_dim: int) -> torch.Tensor:
    """Score of one tensor, as a number where the weights are."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return tensor_score(wide, power=criterion.power, output_dim=output_dim, reduction=criterion.weight_reduction)
