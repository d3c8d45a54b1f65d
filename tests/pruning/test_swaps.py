"""Swaps of blocks: nearer to the best set than what goes one by one, and never outside what may go."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest

from shortstack.artifacts.scores import CriterionScores
from shortstack.pruning.objective import AddedCosts, Objective
from shortstack.pruning.swaps import by_swaps

Costs = dict[int, list[float]]


def drawn(seed: int, *, blocks: int = 10, sources: int = 3, gain: float = 0.0) -> Costs:
    chance = random.Random(seed)
    return {3 * block: [chance.random() ** 2 - gain for _ in range(sources)] for block in range(blocks)}


def cost(costs: Costs, removed: Sequence[int]) -> float:
    """The definition, once more."""
    return max(sum(costs[block][source] for block in removed) for source in range(len(costs[0])))


def greedy(costs: Costs, remove: int) -> list[int]:
    gone: list[int] = []
    for _ in range(remove):
        gone.append(min((block for block in costs if block not in gone), key=lambda block: cost(costs, [*gone, block])))
    return gone


def best(costs: Costs, remove: int) -> float:
    return min(cost(costs, removed) for removed in itertools.combinations(costs, remove))


@pytest.mark.parametrize("remove", [1, 3, 5, 9])
def test_no_swap_of_one_or_two_blocks_is_cheaper_and_most_sets_are_the_best(remove: int) -> None:
    reached, before, sets = 0, 0, 60
    for seed in range(sets):
        costs = drawn(seed)
        start = greedy(costs, remove)
        found = by_swaps(costs, start, lambda _: True)
        assert len(set(found)) == remove
        assert cost(costs, found) <= cost(costs, start) + 1e-9
        for other in itertools.combinations(costs, remove):
            if len(set(other) - set(found)) <= 2:
                assert cost(costs, found) <= cost(costs, other) + 1e-9
        reached += cost(costs, found) <= best(costs, remove) + 1e-9
        before += cost(costs, start) <= best(costs, remove) + 1e-9
    assert reached >= 0.9 * sets
    assert reached > before or before == sets


def test_sets_that_may_not_go_are_no_goal() -> None:
    costs = drawn(1)

    def may_go(removed: Sequence[int]) -> bool:
        return (0 in removed) == (3 in removed)

    for remove in (2, 4):
        start = [block for block in costs if block not in (0, 3)][:remove]
        found = by_swaps(costs, start, may_go)
        assert may_go(found)
        assert cost(costs, found) <= cost(costs, start)


@pytest.mark.parametrize("gain", [0.3, 2.0])
def test_blocks_whose_removal_is_a_gain(gain: float) -> None:
    """Costs may be negative, of some blocks and sources or of all; the search ends all the same."""
    for seed in range(20):
        costs = drawn(seed, gain=gain)
        found = by_swaps(costs, greedy(costs, 4), lambda _: True)
        assert cost(costs, found) <= cost(costs, greedy(costs, 4)) + 1e-9
        for other in itertools.combinations(costs, 4):
            if len(set(other) - set(found)) <= 2:
                assert cost(costs, found) <= cost(costs, other) + 1e-9


def test_nothing_and_everything_stay_as_they_are() -> None:
    costs = drawn(0, blocks=4)
    assert by_swaps(costs, [], lambda _: True) == ()
    assert by_swaps(costs, [0, 3, 6, 9], lambda _: True) == (0, 3, 6, 9)


def test_the_worst_source_alone_is_swapped_for() -> None:
    """Two blocks that each hit another source go together; one by one, the block that goes first is in no best pair."""
    added = {"a": [0.10, 0.13, 0.0], "b": [0.10, 0.0, 0.13]}
    sources = {
        name: CriterionScores("ppl", tuple(7.0 * 2.718281828459045**one for one in own), (0, 1, 2), None, 7.0)
        for name, own in added.items()
    }
    found = CriterionScores("ppl", (8.0, 8.1, 8.2), (0, 1, 2), None, 7.0, sources=sources)
    worst = AddedCosts(found, Objective("worst"))
    assert set(worst.chosen().order[:2]) == {0, 1}
    assert worst.swapped((0, 1), (0, 1, 2), lambda _: True) == (1, 2)
    assert worst.swapped((0, 1), (0, 1), lambda _: True) == (0, 1)
    assert AddedCosts(found, Objective("mean")).swapped((0, 1), (0, 1, 2), lambda _: True) == (0, 1)
    assert AddedCosts(found).swapped((0, 1), (0, 1, 2), lambda _: True) == (0, 1)
