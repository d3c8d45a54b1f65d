"""Whether a difference is more than chance: exact tests where there are few items, the normal approximation where it holds.

Every function returns a probability p: how often a difference at least this large comes up where there is none.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

LEVEL = 0.05  # a difference with a larger p is within noise
# Rows that changed, from which the distribution of their sum is normal enough: the customary bound of McNemar's test.
ENOUGH_CHANGED = 25
MANY = 10_000  # items, of which the mean is normal


def normal_p(errors: float) -> float:
    """Of a difference of so many standard errors, in either direction, where these are known well."""
    return math.erfc(abs(errors) / math.sqrt(2))


def student_p(errors: float, items: int) -> float:
    """Of a mean of so many items that is so many of its own standard errors from 0 (Student's t, two-sided).

    The finite series for whole degrees of freedom: exact where the items are normal; the normal approximation for many.
    """
    freedom = items - 1
    if freedom < 1:
        return 1.0
    if freedom > 1000 or math.isinf(errors):
        return normal_p(errors)
    angle = math.atan(abs(errors) / math.sqrt(freedom))
    cosine = math.cos(angle)
    is_odd = freedom % 2
    term = math.sin(angle) * (cosine if is_odd else 1.0)
    total = 0.0 if freedom == 1 else term
    for k in range(2 + is_odd, freedom - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    inside = (angle + total) * 2 / math.pi if is_odd else total
    return max(0.0, 1.0 - inside)


@functools.cache
def student_errors(items: int) -> float:
    """Standard errors that a mean of so many items must be from 0 to be more than noise: 1.96 of many, 4.3 of three."""
    low, high = 0.0, 1e3
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if student_p(middle, items) > LEVEL else (low, middle)
    return high


def sign_p(groups: Sequence[tuple[int, int, float]]) -> float:
    """Of rows that became right or wrong: the exact sign test, which is McNemar's for one group.

    Without a difference every row that changed is as likely to have become right as wrong. The sum over several groups, such
    as the mean over tasks, is taken with their weights.

    Args:
        groups: (rows that became right, rows that became wrong, weight of a row) of independent sets of rows.
    """
    groups = [group for group in groups if group[0] + group[1]]
    observed = abs(math.fsum(weight * (right - wrong) for right, wrong, weight in groups))
    changed = sum(right + wrong for right, wrong, _ in groups)
    if changed >= ENOUGH_CHANGED:
        spread = math.sqrt(math.fsum((right + wrong) * weight**2 for right, wrong, weight in groups))
        return normal_p(observed / spread)
    sums = {0.0: 1.0}
    for right, wrong, weight in groups:
        rows, after = right + wrong, dict[float, float]()
        for total, share in sums.items():
            for up in range(rows + 1):
                key = round(total + weight * (2 * up - rows), 12)
                after[key] = after.get(key, 0.0) + share * math.comb(rows, up) / 2**rows
        sums = after
    return min(1.0, math.fsum(share for total, share in sums.items() if abs(total) >= observed - 1e-9))


def fisher_p(right: tuple[int, int], rows: tuple[int, int]) -> float:
    """Of two accuracies on rows that are not known to be the same: Fisher's exact test, two-sided."""
    total, all_rows = sum(right), sum(rows)
    every = math.comb(all_rows, total)
    shares = {
        first: math.comb(rows[0], first) * math.comb(rows[1], total - first) / every
        for first in range(max(0, total - rows[1]), min(total, rows[0]) + 1)
    }
    observed = shares[right[0]] * (1 + 1e-9)
    return min(1.0, math.fsum(share for share in shares.values() if share <= observed))
