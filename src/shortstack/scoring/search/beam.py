"""beam: the cheapest sets, one block larger at each step, made of the cheapest ones before. With one set, greedy (SLEB).

At each step every block that may still go is taken away beside what is gone already, and the model measured without it
(Song et al. 2024, algorithm 1); `width` sets are kept for the next step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch

from shortstack.engine.interface import RemovalSet

Measure = Callable[[Collection[RemovalSet]], torch.Tensor]


@dataclass(frozen=True)
class Ranked:
    """Sets of one size, the cheapest first.

    Attributes:
        sets: positions of the blocks that go.
        costs: what each costs; lower is better.
        skipped: sets that were not measured, because the family cannot be cut so, and why.
    """

    sets: tuple[RemovalSet, ...]
    costs: tuple[float, ...]
    skipped: dict[RemovalSet, str] = field(default_factory=dict)


def beam(
    costs_of: Measure,
    candidates: Collection[int],
    remove: int,
    *,
    width: int = 1,
    reason_against: Callable[[RemovalSet], str | None] = lambda _: None,
    on_step: Callable[[Ranked], object] = lambda _: None,
) -> list[Ranked]:
    """The cheapest sets of 1, 2, ... `remove` blocks that this search sees, a `Ranked` per size.

    Args:
        costs_of: the cost of each set, [S]; lower is better.
        candidates: positions of the removable blocks.
        remove: how many blocks go in the end.
        width: how many sets are kept for the next step.
        reason_against: why a set cannot go from this family, or None. Such a set is not measured, but larger ones that hold
            it may be: a block that cannot be removed alone may be removable with another.
        on_step: called with the sets of each size.

    Returns:
        As many as `remove`, fewer where no larger set can be removed.
    """
    kept: list[RemovalSet] = [frozenset()]
    steps: list[Ranked] = []
    for _ in range(remove):
        grown = sorted(
            {removed | {index} for removed in kept for index in candidates if index not in removed}, key=sorted
        )
        reasons = {removed: reason for removed in grown if (reason := reason_against(removed)) is not None}
        possible = [removed for removed in grown if removed not in reasons]
        costs = costs_of(possible).tolist() if possible else []
        order = sorted(range(len(possible)), key=lambda place: (costs[place], sorted(possible[place])))
        ranked = Ranked(tuple(possible[place] for place in order), tuple(costs[place] for place in order), reasons)
        kept = list(ranked.sets[:width]) or list(reasons)[:width]
        steps.append(ranked)
        on_step(ranked)
        if not kept:
            break
    return steps
