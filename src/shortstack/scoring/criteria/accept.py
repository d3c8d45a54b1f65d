"""accept: how seldom the dense model would accept a token that the model without a block drafts.

1 - E[sum over tokens of min(p, q)], the expected acceptance of speculative sampling (Leviathan et al. 2023, theorem 3.5).
Needs logits. The mean is over predicted positions.
"""

from __future__ import annotations

import torch

from shortstack.artifacts.scores import CriterionScores
from shortstack.scoring.criteria import Criterion, LogitsPass, Swept
from shortstack.scoring.criteria.windows_mean import mean_scores


class Rejection(Criterion):
    """Mean over predicted positions of 1 - sum over the vocabulary of min(p, q)."""

    def on_logits(self, logits: LogitsPass) -> None:
        """Add up each window's rejections."""
        accepted_BT = torch.minimum(logits.dense.probabilities, logits.without.probabilities).sum(dim=-1)
        self.add(logits.index, logits.windows, logits.summed(1 - accepted_BT))

    def finish(self, swept: Swept) -> CriterionScores:
        """Mean per predicted token, with its standard error over windows."""
        return mean_scores(self.name, swept, swept.per_window(self) / swept.counted_W, weights_W=swept.window_weights)
