"""From the saliences of single weights to one number per tensor and per block, as published."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from shortstack.artifacts.scores import CriterionScores
from shortstack.runtime.devices import exact_place
from shortstack.scoring.criteria import BlockPass, Criterion, Reduction, Swept


def scores_of_tensors(
    block: BlockPass, salience: Callable[[str], torch.Tensor | None], parameters: Mapping[str, Any]
) -> dict[str, float]:
    """The score of each scored tensor of a block, by name.

    Args:
        salience: one number per weight of the tensor with this name; None where all of them are 0.
        parameters: with `p`, the power, and `weight`, the reduction over output rows.
    """
    scores: dict[str, torch.Tensor] = {}
    for parameter in block.scored:
        salient = salience(parameter.name)
        scores[parameter.name] = (
            exact_place(torch.zeros((), device=block.weights[parameter.name].device)).double()
            if salient is None
            else tensor_score(
                salient, power=parameters["p"], output_dim=parameter.output_dim, reduction=parameters["weight"]
            )
        )
    # From where they were computed all together: each on its own would wait for the device.
    return dict(zip(scores, torch.stack(list(scores.values())).tolist(), strict=True)) if scores else {}


def scores_of_blocks(criterion: Criterion, swept: Swept) -> CriterionScores:
    """A criterion's scores, where it keeps those of each block's tensors; its parameter `block` reduces them."""
    reduction, of = criterion.parameters["block"], criterion.of_sources.get(swept.source, criterion)
    return CriterionScores(
        criterion.name,
        tuple(block_score(list(of.kept[index].values()), reduction) for index in swept.candidates),
        swept.blocks,
        tensors={block: of.kept[index] for index, block in zip(swept.candidates, swept.blocks, strict=True)},
    )


def tensor_score(salience: torch.Tensor, *, power: int, output_dim: int, reduction: Reduction) -> torch.Tensor:
    """Score of one tensor, a number where the weights are.

    |salience|^power, summed over input dimensions, then reduced over output rows.

    Args:
        salience: one number per weight, any shape; a vector is its own output rows.
        power: 1 or 2.
        output_dim: the dimension of the output rows.
        reduction: over the output rows; sums and products are formed in float64.
    """
    powered = exact_place(salience.abs() if power == 1 else salience.square())
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
