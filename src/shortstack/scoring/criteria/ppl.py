"""ppl: the perplexity of the calibration set without a block (Shortened LLaMA, Kim et al. 2024). Needs branches."""

from __future__ import annotations

from shortstack.artifacts.results import perplexity
from shortstack.artifacts.scores import CriterionScores
from shortstack.scoring.criteria import Criterion, Swept
from shortstack.scoring.criteria.windows_mean import mean_and_error


class Perplexity(Criterion):
    """Perplexity without each block: exp of the mean NLL over all predicted tokens that count.

    Its standard error is, over windows, that of the difference to the dense model in mean NLL.
    """

    def finish(self, swept: Swept) -> CriterionScores:
        """Perplexities without each block, and the dense model's."""
        dense_nll_W, without_nll_NW = swept.dense_nll_W, swept.without_nll_NW
        if dense_nll_W is None or without_nll_NW is None:
            raise ValueError("ppl needs a forward sweep with branches")
        mean_N, _ = mean_and_error(without_nll_NW, swept.window_weights)
        dense, _ = mean_and_error(dense_nll_W[None], swept.window_weights)
        _, stderr = mean_and_error(without_nll_NW - dense_nll_W, swept.window_weights)
        return CriterionScores(
            self.name,
            tuple(perplexity(value) for value in mean_N.tolist()),
            swept.blocks,
            stderr=None if stderr is None else tuple(stderr.tolist()),
            dense_ppl=perplexity(float(dense[0])),
        )
