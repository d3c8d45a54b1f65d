"""evolution: sets of one size that are changed by swaps; the cheapest is kept (after EvoPress, Sieberling et al. 2024).

A (1 + offspring) search: each generation swaps a block that goes for one that stays, once or more often, in copies of the
best set so far; all are measured on few windows, the better ones on more, and the best ones on all of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

from shortstack.engine.interface import RemovalSet
from shortstack.scoring.search.beam import Ranked

# (sets, how many windows) -> the cost of each, [S]
MeasureOn = Callable[[Sequence[RemovalSet], int], torch.Tensor]


@dataclass(frozen=True)
class Evolution:
    """How long a search runs, and on how many windows each round of selection looks.

    Attributes:
        generations: how many.
        offspring: new sets in each.
        seed: of the swaps.
    """

    generations: int = 20
    offspring: int = 16
    seed: int = 0

    def rounds(self, windows: int) -> list[tuple[int, int]]:
        """(windows, how many sets are left after it) of each round of selection: an eighth, a third, all of the windows."""
        few, more = max(1, windows // 8), max(1, windows // 3)
        return [(few, max(2, self.offspring // 4)), (more, max(1, self.offspring // 8)), (windows, 1)]


def evolve(
    costs_of: MeasureOn,
    start: RemovalSet,
    candidates: Collection[int],
    windows: int,
    *,
    how: Evolution = Evolution(),
    reason_against: Callable[[RemovalSet], str | None] = lambda _: None,
    on_generation: Callable[[int, RemovalSet, float], object] = lambda *_: None,
) -> Ranked:
    """The sets that were measured on all windows, the cheapest first.

    Args:
        costs_of: the cost of each set on the first so many windows.
        start: the first parent, a removable set.
        candidates: positions of the removable blocks.
        windows: how many there are.
        how: how long.
        reason_against: why a set cannot go from this family, or None; such a set is not measured.
        on_generation: called with each generation's number, its best set and what that costs.
    """
    chance, parent = random.Random(how.seed), start
    costs = {start: float(costs_of([start], windows)[0])}
    skipped: dict[RemovalSet, str] = {}
    for generation in range(how.generations):
        living = _offspring(parent, sorted(candidates), how.offspring, chance)
        for removed in list(living):
            reason = reason_against(removed)
            if reason is not None:
                skipped[removed] = reason
                living.remove(removed)
        for some, survivors in how.rounds(windows):
            if not living:
                break
            found = costs_of(living, some).tolist()
            order = sorted(range(len(living)), key=lambda place: (found[place], sorted(living[place])))
            if some == windows:
                costs |= dict(zip(living, found, strict=True))
            living = [living[place] for place in order[:survivors]]
        parent = min(costs, key=lambda removed: (costs[removed], sorted(removed)))
        on_generation(generation, parent, costs[parent])
    ordered = sorted(costs, key=lambda removed: (costs[removed], sorted(removed)))
    return Ranked(tuple(ordered), tuple(costs[removed] for removed in ordered), skipped)


def _offspring(parent: RemovalSet, candidates: Sequence[int], wanted: int, chance: random.Random) -> list[RemovalSet]:
    """Different sets, each one swap or more away: as a geometric distribution has it, mostly one."""
    found: dict[RemovalSet, None] = {}
    for _ in range(8 * wanted):  # small models have fewer neighbours than are wanted
        going, staying = sorted(parent), [index for index in candidates if index not in parent]
        swaps = 1
        while swaps < min(len(going), len(staying)) and chance.random() < 0.5:
            swaps += 1
        if not going or not staying:
            break
        changed = (parent - set(chance.sample(going, swaps))) | set(chance.sample(staying, swaps))
        found.setdefault(changed)
        if len(found) == wanted:
            break
    return list(found)
