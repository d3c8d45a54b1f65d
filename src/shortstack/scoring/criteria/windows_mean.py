"""What criteria that average over tokens share: a number per token, its mean per window, the mean and error over windows."""

from __future__ import annotations

import math

import torch

from shortstack.artifacts.scores import CriterionScores
from shortstack.runtime.devices import exact_place
from shortstack.scoring.criteria import BlockPass, Criterion, Swept


class WindowsMean(Criterion):
    """The mean over tokens of what `of_tokens` gives; `first_token=skip` leaves out the first of each window.

    The first token, whatever it is, has a state of huge norm in many models, which no block turns by much.
    """

    def of_tokens(self, block: BlockPass) -> torch.Tensor:
        """A number per token, [B, T]."""
        raise NotImplementedError(f"{type(self).__name__}.of_tokens")

    def on_block(self, block: BlockPass) -> None:
        """Keep each window's mean."""
        first = self.parameters["first_token"] == "skip"
        self.add(block.index, block.windows, exact_place(self.of_tokens(block)[:, int(first) :]).double().mean(dim=1))

    def finish(self, swept: Swept) -> CriterionScores:
        """Mean over windows, with its standard error."""
        return mean_scores(self.name, swept, swept.per_window(self))


def mean_scores(name: str, swept: Swept, values_NW: torch.Tensor, run: int = 1) -> CriterionScores:
    """Means over windows, and their standard errors where there are two windows.

    Args:
        name: of the criterion, as the user wrote it.
        swept: what the sweeps gave.
        values_NW: a number per scored block and window.
        run: of how many adjacent blocks a number is.
    """
    windows = values_NW.shape[1]
    errors = values_NW.std(dim=1, correction=1) / math.sqrt(windows) if windows > 1 else None
    return CriterionScores(
        name,
        tuple(values_NW.mean(dim=1).tolist()),
        swept.blocks,
        stderr=tuple(errors.tolist()) if errors is not None else None,
        run=run,
    )
