"""From losses of windows to what each named source pays for a set of blocks, measured whole.

Legend: S sets, W windows.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from shortstack.artifacts.results import perplexity
from shortstack.pruning.objective import Objective

if TYPE_CHECKING:
    import torch

    from shortstack.scoring.search.measured_sets import MeasuredSets


def objective_costs(
    objective: Objective, measured: MeasuredSets, nll_SW: torch.Tensor, dense_1W: torch.Tensor
) -> torch.Tensor:
    """The objective's value of each set, [S], on the first windows of all, as many as there are losses.

    Args:
        measured: knows the windows' sources; those that have none of these windows are left out.
        nll_SW: losses without each set.
        dense_1W: those of the dense model.
    """
    import torch

    from shortstack.scoring.criteria.windows_mean import mean_and_error

    dense = {
        source: float(mean_and_error(own, weights)[0])
        for source, (own, weights) in measured.of_sources(dense_1W).items()
    }
    without = {
        source: mean_and_error(own, weights)[0].tolist()
        for source, (own, weights) in measured.of_sources(nll_SW).items()
    }
    costs = [
        objective.cost({source: without[source][place] - loss for source, loss in dense.items()}, dense)
        for place in range(len(nll_SW))
    ]
    return torch.tensor(costs, dtype=torch.float64)


def judged_change(
    measured: MeasuredSets, nll_W: torch.Tensor, dense_W: torch.Tensor
) -> tuple[dict[str, Any], dict[str, dict[str, float | None]]]:
    """(`ppl`, `increase` and `stderr` of a set over all tokens; the same of each named source)."""
    whole = _grown(nll_W, dense_W, measured.weights(len(nll_W)))
    dense = measured.of_sources(dense_W[None])
    sources = {
        source: _grown(own[0], dense[source][0][0], weights)
        for source, (own, weights) in measured.of_sources(nll_W[None]).items()
    }
    return whole, sources


def _grown(nll_W: torch.Tensor, dense_W: torch.Tensor, weights_W: torch.Tensor | None) -> dict[str, float | None]:
    """Perplexity, by what share it is larger than the dense model's, and the paired standard error of that."""
    from shortstack.scoring.criteria.windows_mean import mean_and_error

    mean, _ = mean_and_error(nll_W[None], weights_W)
    change, error = mean_and_error((nll_W - dense_W)[None], weights_W)
    ratio = math.exp(float(change[0]))
    return {
        "ppl": perplexity(float(mean[0])),
        "increase": ratio - 1,
        "stderr": None if error is None else ratio * float(error[0]),
    }
