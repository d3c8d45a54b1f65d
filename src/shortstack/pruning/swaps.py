"""A set of blocks whose largest sum over several costs is small: swaps of blocks until none makes it smaller.

Legend: P groups that go, Q groups that stay, S costs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

_AT_ONCE = 2  # blocks that are swapped for as many others


def by_swaps(
    costs: Mapping[int, Sequence[float]], start: Sequence[int], may_go: Callable[[Sequence[int]], bool]
) -> tuple[int, ...]:
    """The set that is reached from another one of its size; no swap of one block, or of two, makes it cheaper.

    Args:
        costs: of each block: they add up, each apart, and the largest of the sums is what a set costs.
        start: the set to begin with.
        may_go: whether a set can be chosen at all.
    """
    removed = tuple(sorted(start))
    while removed and (better := next(_cheaper(costs, removed, may_go), None)) is not None:
        removed = better
    return removed


def _cheaper(
    costs: Mapping[int, Sequence[float]], removed: Sequence[int], may_go: Callable[[Sequence[int]], bool]
) -> Iterator[tuple[int, ...]]:
    """Sets that cost less, the cheapest first; by swaps of one block before those of two."""
    import numpy as np

    staying = [block for block in costs if block not in removed]
    sums_S = _sums(costs, [removed])[0]
    now = float(sums_S.max())
    for size in range(1, min(_AT_ONCE, len(removed), len(staying)) + 1):
        going = list(itertools.combinations(removed, size))
        coming = list(itertools.combinations(staying, size))
        after_PQ = (sums_S - _sums(costs, going)[:, None] + _sums(costs, coming)[None]).max(axis=2)
        cheapest = after_PQ.ravel().argsort(kind="stable")
        for place in cheapest[: int((after_PQ < now - 1e-12 * max(1.0, abs(now))).sum())]:
            out, new = (int(one) for one in np.divmod(place, len(coming)))
            changed = tuple(sorted({*removed, *coming[new]}.difference(going[out])))
            if may_go(changed):
                yield changed


def _sums(costs: Mapping[int, Sequence[float]], groups: Sequence[Sequence[int]]) -> np.ndarray[Any, Any]:
    """[groups, S]."""
    import numpy as np

    return np.array([[sum(one) for one in zip(*(costs[block] for block in group), strict=True)] for group in groups])
