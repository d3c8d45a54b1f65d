"""bi: block influence, 1 - cosine of what goes into a block and what comes out of it (ShortGPT, Men et al. 2024, eq. 1).

Needs hidden states. They are those at the block, of the dense model: for the last block, those before the final norm.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from shortstack.scoring.criteria import BlockPass
from shortstack.scoring.criteria.windows_mean import WindowsMean


class BlockInfluence(WindowsMean):
    """Mean over tokens of 1 - cos(x_in, x_out)."""

    def of_tokens(self, block: BlockPass) -> torch.Tensor:
        """1 - cosine, [B, T], in float32."""
        inputs_BTD, outputs_BTD = block.hidden_states()
        return 1 - functional.cosine_similarity(inputs_BTD.float(), outputs_BTD.float(), dim=-1)
