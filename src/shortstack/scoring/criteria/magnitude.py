"""magnitude: |weight| summed over a block (Shortened LLaMA's baseline). Needs nothing but the weights."""

from __future__ import annotations

import torch

from shortstack.artifacts.scores import CriterionScores
from shortstack.scoring.criteria import BlockPass, Criterion, Swept
from shortstack.scoring.criteria.reductions import scores_of_blocks, scores_of_tensors


class Magnitude(Criterion):
    """|w|^p of every scored weight."""

    def on_block(self, block: BlockPass) -> None:
        """Score the block's tensors."""

        def salience(name: str) -> torch.Tensor:
            weight = block.weights[name]
            return weight.to(torch.promote_types(weight.dtype, torch.float32))

        self.kept[block.index] = scores_of_tensors(block, salience, self.parameters)

    def finish(self, swept: Swept) -> CriterionScores:
        """Scores from those of the tensors."""
        return scores_of_blocks(self, swept)
