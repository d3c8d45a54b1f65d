"""Greedy and beam search against a naive version that loads the model and bypasses every set, one by one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shortstack.engine.removal_sets import groups_that_fit, streams_at
from shortstack.engine.select import EngineOptions, choose_engine
from shortstack.families.open_model import open_checkpoint
from shortstack.scoring.search.beam import beam
from shortstack.scoring.search.evolution import Evolution, evolve
from shortstack.scoring.search.measured_sets import MeasuredSets
from shortstack.scoring.shared_windows import SharedWindows
from tests import oracle, pico

Built = Callable[..., Path]


def measured(model: Path, memory: Any = "streamed", windows: int = 5, **options: Any) -> MeasuredSets:
    given = pico.windows(windows)
    engine_options = {key: options.pop(key) for key in ("stream_bytes",) if key in options}
    how = EngineOptions(torch.float32, torch.device("cpu"), memory, **engine_options)
    engine = choose_engine(open_checkpoint(model), given, how)
    return MeasuredSets(engine, SharedWindows(given), **options)


@torch.no_grad()
def naive_nll(model: Path, removed: set[int], windows: int = 5) -> float:
    loaded = oracle.bypassed(pico.load(model), removed)
    return float(oracle.mean_nll(loaded, pico.windows(windows)).mean())


SETS = [
    frozenset[int](),
    frozenset({0}),
    frozenset({5}),
    frozenset({1, 2, 3}),
    frozenset({1, 4}),
    frozenset({0, 1, 2, 3, 4}),
]


@pytest.mark.parametrize("family", ["llama", "falcon", "gemma2", "gpt2"])
def test_sets_equal_passing_over_them(built: Built, family: str, memory: Any) -> None:
    found = measured(built(family), memory).nll(SETS).mean(dim=1).tolist()
    assert found == pytest.approx([naive_nll(built(family), set(removed)) for removed in SETS], rel=1e-5)


def test_sets_in_groups_are_the_same(built: Built) -> None:
    sets = [frozenset(pair) for pair in itertools.combinations(range(6), 2)]
    assert len(list(groups_that_fit(sets, 4))) == 4
    together, apart = measured(built("llama")), measured(built("llama"), stream_bytes=4 * 5 * 16 * 32 * 4)
    assert apart.engine.group < 6
    assert together.nll(sets).tolist() == [pytest.approx(row, rel=1e-6) for row in apart.nll(sets).tolist()]


def test_what_sets_have_in_common_is_computed_once() -> None:
    """All blocks of one size beside the dense model cost N(N+1)/2 block evaluations, as one sweep for ppl does."""
    singles = [frozenset[int](), *(frozenset({index}) for index in range(6))]
    assert sum(streams_at(singles, 6)) == 6 * 7 // 2
    assert streams_at([frozenset({0, 1}), frozenset({0, 2})], 4) == [0, 1, 1, 2]


def naive_greedy(model: Path, depth: int, remove: int) -> tuple[list[set[int]], int]:
    """(the set after each step, block evaluations of one window)."""
    removed: set[int] = set()
    steps, evaluations = [], 0
    for _ in range(remove):
        costs = {index: naive_nll(model, removed | {index}) for index in range(depth) if index not in removed}
        evaluations += len(costs) * (depth - len(removed) - 1)
        removed = removed | {min(costs, key=lambda index: costs[index])}
        steps.append(removed)
    return steps, evaluations


def test_greedy_is_the_naive_greedy_at_six_tenths_of_its_cost(built: Built) -> None:
    model = built("llama", num_hidden_layers=12)
    steps, evaluations = naive_greedy(model, 12, 4)
    sets = measured(model)
    found = beam(lambda asked: sets.nll(asked).mean(dim=1), range(12), 4)
    assert [set(step.sets[0]) for step in found] == steps
    assert sets.evaluations <= 0.6 * 5 * evaluations


def test_a_wide_beam_finds_the_cheapest_pair(built: Built) -> None:
    sets = measured(built("llama"))
    found = beam(lambda asked: sets.nll(asked).mean(dim=1), range(6), 2, width=6)
    pairs = [frozenset(pair) for pair in itertools.combinations(range(6), 2)]
    costs = sets.nll(pairs).mean(dim=1).tolist()
    assert found[1].sets == tuple(pairs[place] for place in sorted(range(15), key=lambda place: costs[place]))
    assert list(found[1].costs) == sorted(costs)


def test_sets_that_a_family_refuses_are_passed_by(built: Built) -> None:
    """Block 0 can go with block 1 alone: the pair is found, and what was not measured is said."""
    costs = {frozenset(some): sum(some) + 1.0 for size in (1, 2) for some in itertools.combinations(range(3), size)}
    asked: list[frozenset[int]] = []

    def costs_of(sets: Any) -> torch.Tensor:
        asked.extend(sets)
        return torch.tensor([costs[one] for one in sets])

    def reason(removed: frozenset[int]) -> str | None:
        return "alone" if len(removed) == 1 or removed == {0, 1} else None

    steps = beam(costs_of, range(3), 2, reason_against=reason)
    assert steps[0].sets == ()
    assert len(steps[0].skipped) == 3
    assert steps[1].skipped == {frozenset({0, 1}): "alone"}
    assert steps[1].sets == (frozenset({0, 2}),)
    assert asked == [frozenset({0, 2})]


def test_a_killed_search_finds_what_it_measured(built: Built, tmp_path: Path) -> None:
    file, key = tmp_path / "sets.jsonl", {"model": "a"}
    whole = measured(built("llama"), file=file, key=key)
    first = beam(lambda asked: whole.nll(asked).mean(dim=1), range(6), 3)
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:9]) + lines[9][: len(lines[9]) // 2])  # killed within a line
    again = measured(built("llama"), file=file, key=key)
    assert again.known == 8
    second = beam(lambda asked: again.nll(asked).mean(dim=1), range(6), 3)
    assert second == first
    assert 0 < again.evaluations < whole.evaluations
    assert measured(built("llama"), file=file, key=key).known == whole.known
    assert measured(built("llama"), file=file, key={"model": "b"}).known == 0


def test_more_windows_are_measured_beside_those_that_are_known(built: Built) -> None:
    sets = measured(built("llama"))
    few = sets.nll(SETS, windows=2)
    assert few.shape == (6, 2)
    after = sets.evaluations
    assert torch.equal(sets.nll(SETS)[:, :2], few)
    assert sets.evaluations == after // 2 * 5
    assert sets.nll(SETS).mean(dim=1).tolist() == pytest.approx(
        measured(built("llama")).nll(SETS).mean(dim=1).tolist(), rel=1e-6
    )


def test_evolution_comes_to_the_cheapest_set(built: Built) -> None:
    sets = measured(built("llama"))

    def costs_of(asked: Any, windows: int) -> torch.Tensor:
        return sets.nll(asked, windows).mean(dim=1)

    dearest = beam(lambda asked: -sets.nll(asked).mean(dim=1), range(6), 2)[-1].sets[0]
    found = evolve(costs_of, dearest, range(6), 5, how=Evolution(generations=12, offspring=6))
    pairs = [frozenset(pair) for pair in itertools.combinations(range(6), 2)]
    costs = sets.nll(pairs).mean(dim=1)
    assert found.sets[0] == pairs[int(costs.argmin())]
    assert found.sets[-1] == dearest or found.costs[-1] >= found.costs[0]
    assert all(len(one) == 2 for one in found.sets)
    again = evolve(costs_of, dearest, range(6), 5, how=Evolution(generations=12, offspring=6))
    assert again == found
