"""Statistics of times: medians, percentiles, spread, ratios of pairs."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from shortstack.benchmark.timing import median_figure, paired_ratio, percentile, variation


def test_percentiles_are_those_of_numpy() -> None:
    values = [0.3, 0.1, 0.7, 0.2, 0.9, 0.4, 0.45]
    for share in (0.0, 0.1, 0.5, 0.9, 0.99, 1.0):
        assert percentile(values, share) == pytest.approx(float(np.quantile(values, share)))
    assert percentile([2.0], 0.9) == 2.0


def test_spread_is_standard_deviation_over_mean() -> None:
    assert variation([1.0, 1.0, 1.0]) == 0.0
    assert variation([0.9, 1.1]) == pytest.approx(statistics.stdev([0.9, 1.1]))
    assert variation([1.0]) is None


def test_a_median_has_the_error_of_a_median() -> None:
    figure = median_figure([1.0, 2.0, 3.0, 10.0], "s")
    assert figure.value == 2.5
    assert figure.stderr == pytest.approx(math.sqrt(math.pi / 2) * statistics.stdev([1, 2, 3, 10]) / 2)
    assert (median_figure([1.0], "s").value, median_figure([1.0], "s").stderr) == (1.0, None)
    assert median_figure([], "s").value is None


def test_what_slows_down_both_of_a_pair_does_not_change_their_ratio() -> None:
    drift = [1.0, 1.5, 2.0, 1.2]
    ratio = paired_ratio([3.0 * one for one in drift], [2.0 * one for one in drift])
    assert (ratio.value, ratio.stderr, ratio.n) == (pytest.approx(1.5), pytest.approx(0, abs=1e-12), 4)
    assert paired_ratio([], [1.0]).value is None
