"""ppl: the perplexity of the calibration set without a block (Shortened LLaMA, Kim et al. 2024). Needs branches."""

from __future__ import annotations

import math

import torch

from shortstack.artifacts.results import perplexity
from shortstack.artifacts.scores import CriterionScores
from shortstack.scoring.criteria import Criterion, Swept


class Perplexity(Criterion):
    """Perplexity without each block, from the losses that the sweep gives."""

    def finish(self, swept: Swept) -> CriterionScores:
        """Perplexities without each block, and the dense model's."""
        dense_nll_W, without_nll_NW = swept.dense_nll_W, swept.without_nll_NW
        if dense_nll_W is None or without_nll_NW is None:
            raise ValueError("ppl needs a forward sweep with branches")
        stderr = paired_stderr(without_nll_NW, dense_nll_W)
        return CriterionScores(
            self.name,
            tuple(perplexities(without_nll_NW)),
            swept.blocks,
            stderr=tuple(stderr) if stderr is not None else None,
            dense_ppl=perplexities(dense_nll_W[None])[0],
        )


def perplexities(nll_NW: torch.Tensor) -> list[float]:
    """exp of the mean NLL over all predicted tokens, per block; windows are equally long, so means of means are means.

    Args:
        nll_NW: mean NLL per predicted token, without block n, on window w.
    """
    return [perplexity(value) for value in nll_NW.mean(dim=1).tolist()]


def paired_stderr(nll_NW: torch.Tensor, base_nll_W: torch.Tensor) -> list[float] | None:
    """Standard error, over windows, of the difference to the dense model in mean NLL; None for a single window."""
    windows = base_nll_W.numel()
    if windows < 2:
        return None
    return [float(value) for value in (nll_NW - base_nll_W).std(dim=1, correction=1) / math.sqrt(windows)]
