"""Importance of attention heads and MLP channels: first-order Taylor, element-wise, summed over each unit (LLM-Pruner).

|weight x gradient| of every weight that belongs to a unit, added up: the rows of q_proj, k_proj, v_proj and of the MLP's
projections into the channels, the columns of o_proj and down_proj. Biases are not scored, as published. Gradients are those
of the mean loss over all windows, from the backward sweep.
"""

from __future__ import annotations

import torch

from shortstack.pruning.width.shape import DOWN, KEY, OUTPUT, QUERY, VALUE, BlockShape
from shortstack.pruning.width.units import UnitScores
from shortstack.runtime.devices import exact_place
from shortstack.scoring.criteria import BlockPass, Criterion, Swept
from shortstack.scoring.criteria.taylor import salience


class UnitSalience(Criterion):
    """The importance of every unit of every block; a block's own score is their sum. Its parameter is the `shape`."""

    def on_block(self, block: BlockPass) -> None:
        """Score the block's units."""
        shape: BlockShape = self.parameters["shape"]
        gradients = block.gradients or {}

        def along(name: str, dim: int, units: int) -> torch.Tensor:
            """What a matrix adds to the importance of so many units, which lie along a dimension."""
            weight, gradient = block.weights[f"{name}.weight"], gradients.get(f"{name}.weight")
            if gradient is None:  # a weight that the loss does not reach
                return exact_place(torch.zeros(units, device=weight.device)).double()
            rows = exact_place(salience(weight, gradient).abs_()).sum(dim=1 - dim, dtype=torch.float64)
            return rows.reshape(units, -1).sum(dim=1)

        channels = torch.stack(
            [*(along(name, 0, shape.channels) for name in shape.inner), along(DOWN, 1, shape.channels)]
        )
        self.kept[block.index] = {
            "queries": (along(QUERY, 0, shape.heads) + along(OUTPUT, 1, shape.heads)).tolist(),
            "kv_heads": (along(KEY, 0, shape.kv_heads) + along(VALUE, 0, shape.kv_heads)).tolist(),
            "channels": channels.sum(dim=0).tolist(),
        }

    def finish(self, swept: Swept) -> UnitScores:
        """A block's score is the sum over its units."""
        sums = (sum(map(sum, self.kept[index].values())) for index in swept.candidates)
        return UnitScores(self.name, tuple(sums), swept.blocks, units=self.kept)
