"""kl: KL divergence of what the model predicts without a block from what the dense model predicts, KL(dense || without).

Needs logits. The mean is over predicted positions: what the last token of a window would predict is not in the window.
"""

from __future__ import annotations

from shortstack.artifacts.scores import CriterionScores
from shortstack.scoring.criteria import Criterion, LogitsPass, Swept
from shortstack.scoring.criteria.windows_mean import mean_scores


class Divergence(Criterion):
    """Sum over the vocabulary of p * (log p - log q), p of the dense model, q without the block, in nats."""

    def on_logits(self, logits: LogitsPass) -> None:
        """Add up each window's divergences."""
        dense, without = logits.dense, logits.without
        of_tokens_BT = (dense.probabilities * (dense.log_probabilities - without.log_probabilities)).sum(dim=-1)
        self.add(logits.index, logits.windows, logits.summed(of_tokens_BT))

    def finish(self, swept: Swept) -> CriterionScores:
        """Mean per predicted token, with its standard error over windows."""
        return mean_scores(self.name, swept, swept.per_window(self) / swept.counted_W, weights_W=swept.window_weights)
