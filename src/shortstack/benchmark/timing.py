"""Statistics of times: medians, percentiles, spread, and ratios of runs that were made in turns."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

from shortstack.artifacts.results import Figure

UNSTEADY = 0.05  # coefficient of variation from which a figure is flagged
_MEDIAN_ERROR = math.sqrt(math.pi / 2)  # standard error of a median over that of a mean, of many normal values


def best_seconds(
    calls: Sequence[Callable[[], object]], *, rounds: int, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """The least time that each call took, of several rounds in which they take turns."""
    best = [float("inf")] * len(calls)
    for _ in range(rounds):
        for which, call in enumerate(calls):
            begun = clock()
            call()
            best[which] = min(best[which], clock() - begun)
    return best


def percentile(values: Sequence[float], share: float) -> float:
    """The value that so large a share is below, interpolated between neighbours."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    return ordered[low] + (ordered[min(low + 1, len(ordered) - 1)] - ordered[low]) * (at - low)


def variation(values: Sequence[float]) -> float | None:
    """Standard deviation over mean; None of fewer than two values."""
    if len(values) < 2:
        return None
    mean = statistics.fmean(values)
    return statistics.stdev(values) / mean if mean else None


def median_figure(values: Sequence[float], unit: str) -> Figure:
    """The median of per-run values with its standard error."""
    if not values:
        return Figure(None, None, unit, 0, "nothing was measured")
    return Figure(statistics.median(values), _median_error(values), unit, len(values))


def paired_ratio(base: Sequence[float], other: Sequence[float]) -> Figure:
    """How many times as fast the other is: the median over the pairs of runs, with its standard error."""
    ratios = [ours / theirs for ours, theirs in zip(base, other, strict=False) if ours > 0 and theirs > 0]
    if not ratios:
        return Figure(None, None, "times", 0, "nothing was measured")
    return Figure(statistics.median(ratios), _median_error(ratios), "times", len(ratios))


def _median_error(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    return _MEDIAN_ERROR * statistics.stdev(values) / math.sqrt(len(values))
