"""taylor: |weight x gradient| summed over a block (Shortened LLaMA): the first-order change of the loss.

Needs gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from shortstack.artifacts.scores import CriterionScores
from shortstack.scoring.criteria import BlockPass, Criterion, Swept
from shortstack.scoring.criteria.reductions import scores_of_blocks, scores_of_tensors


class Taylor(Criterion):
    """|w * g|^p of every scored weight, g of the mean loss over all windows or of the sum of those of batches."""

    def __init__(self, name: str, parameters: Mapping[str, Any]) -> None:
        super().__init__(name, parameters)
        self.batch = parameters["batch"]

    def on_block(self, block: BlockPass) -> None:
        """Score the block's tensors."""
        gradients = block.gradients or {}

        def salience_of(name: str) -> torch.Tensor | None:
            # A parameter that the loss does not reach (an expert that no token went to) has gradient 0.
            return salience(block.weights[name], gradients[name]) if name in gradients else None

        self.kept[block.index] = scores_of_tensors(block, salience_of, self.parameters)

    def finish(self, swept: Swept) -> CriterionScores:
        """Scores from those of the tensors."""
        return scores_of_blocks(self, swept)


def salience(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """w * g elementwise, in float32 at least.

    `gradient` must be complete: the absolute value of a sum is not the sum of absolute values.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(wide) * gradient.to(wide)
