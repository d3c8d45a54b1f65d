"""update: how large a block's update of the residual stream is beside the stream, ||x_out - x_in|| / ||x_in||.

Needs hidden states. They are those at the block, of the dense model: for the last block, those before the final norm.
"""

from __future__ import annotations

import torch

from shortstack.scoring.criteria import BlockPass
from shortstack.scoring.criteria.windows_mean import WindowsMean


class RelativeUpdate(WindowsMean):
    """Mean over tokens of ||x_out - x_in|| / ||x_in||."""

    def of_tokens(self, block: BlockPass) -> torch.Tensor:
        """The ratio of the norms, [B, T], in float32."""
        inputs_BTD, outputs_BTD = (states.float() for states in block.hidden_states())
        # A token whose state is all zeros has no ratio: 0, where nothing is added to it either.
        size_BT = torch.linalg.vector_norm(inputs_BTD, dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        ratio_BT: torch.Tensor = torch.linalg.vector_norm(outputs_BTD - inputs_BTD, dim=-1) / size_BT
        return ratio_BT
