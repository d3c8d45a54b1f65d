"""angular: the angle between what goes into a run of n blocks and what comes out of it (Gromov et al. 2024, eq. 4).

d(l, n) = arccos(cos(x_l, x_(l+n))) / pi, at the last token of each window, or averaged over tokens. Needs states. They are
those at the blocks, of the dense model: after the last block, those before the final norm.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from shortstack.artifacts.scores import CriterionScores
from shortstack.errors import ShortstackError
from shortstack.runtime.devices import exact_place
from shortstack.scoring.criteria import Criterion, StatesPass, Swept
from shortstack.scoring.criteria.windows_mean import mean_scores


class AngularDistance(Criterion):
    """The angle over a run that begins at a block, in half turns: 0 for the same direction, 1 for the opposite one."""

    def on_states(self, states: StatesPass) -> None:
        """Keep each window's angle of each run."""
        run, first = self.parameters["n"], int(self.parameters["first_token"] == "skip")
        last = slice(-1, None) if self.parameters["tokens"] == "last" else slice(first, None)
        for index in states.candidates:
            if index + run <= states.depth:
                before, after = (states.at(place)[:, last].float() for place in (index, index + run))
                self.add(index, states.windows, exact_place(angle(before, after)).double().mean(dim=1))

    def finish(self, swept: Swept) -> CriterionScores:
        """Mean over windows of the runs that fit, by the block that each begins with.

        Raises:
            ShortstackError: no run is as long.
        """
        run = self.parameters["n"]
        begins = [place for place, index in enumerate(swept.candidates) if index in self.kept]
        if not begins:
            raise ShortstackError(f"criterion {self.name}: no run of {run} blocks fits", hint="use a smaller n")
        some = swept.of_some(begins)
        return mean_scores(self.name, some, some.per_window(self), run=run)


def angle(first_BTD: torch.Tensor, second_BTD: torch.Tensor) -> torch.Tensor:
    """The angle between two states of each token, in half turns, [B, T].

    By the half-angle formula: arccos loses half of its digits where the states are nearly the same.
    """
    first, second = (functional.normalize(states, dim=-1) for states in (first_BTD, second_BTD))
    apart, together = (torch.linalg.vector_norm(one, dim=-1) for one in (first - second, first + second))
    return 2 * torch.atan2(apart, together) / math.pi
