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


def mean_scores(
    name: str, swept: Swept, values_NW: torch.Tensor, run: int = 1, weights_W: torch.Tensor | None = None
) -> CriterionScores:
    """Means over windows, and their standard errors where there are two windows.

    Args:
        name: of the criterion, as the user wrote it.
        swept: what the sweeps gave.
        values_NW: a number per scored block and window.
        run: of how many adjacent blocks a number is.
        weights_W: what each window weighs; all the same by default.
    """
    mean_N, errors = mean_and_error(values_NW, weights_W)
    return CriterionScores(
        name,
        tuple(mean_N.tolist()),
        swept.blocks,
        stderr=tuple(errors.tolist()) if errors is not None else None,
        run=run,
    )


def mean_and_error(
    values_NW: torch.Tensor, weights_W: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Means over windows, and their standard errors (of a ratio, where windows weigh differently); none for one window.

    Args:
        values_NW: a number per window.
        weights_W: what each window weighs, 1 on average; all the same by default.
    """
    windows = values_NW.shape[1]
    if weights_W is None:
        mean_N = values_NW.mean(dim=1)
        return mean_N, values_NW.std(dim=1, correction=1) / math.sqrt(windows) if windows > 1 else None
    mean_N = (values_NW * weights_W).mean(dim=1)
    residual_NW = (values_NW - mean_N[:, None]) * weights_W
    variance_N = residual_NW.square().sum(dim=1) / max(1, windows - 1) / windows
    return mean_N, variance_N.sqrt() if windows > 1 else None
