"""The sets that a quadratic model holds to be the cheapest are those of looking at all."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from shortstack.scoring.search import gates
from shortstack.scoring.search.gates import QuadraticModel, quadratic_model
from shortstack.scoring.shared_windows import SharedWindows


def model_of(count: int, seed: int) -> QuadraticModel:
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(count, count, generator=generator, dtype=torch.float64)
    places = tuple(range(10, 10 + count))
    return QuadraticModel(places, torch.randn(count, generator=generator, dtype=torch.float64), half + half.T)


def by_definition(model: QuadraticModel, removed: frozenset[int]) -> float:
    inside = [number for number, place in enumerate(model.candidates) if place in removed]
    linear = -sum(float(model.gradient_N[i]) for i in inside)
    return linear + sum(float(model.hessian_NN[i, j]) for i in inside for j in inside) / 2


def all_sets(model: QuadraticModel, remove: int) -> list[frozenset[int]]:
    every = [frozenset(one) for one in itertools.combinations(model.candidates, remove)]
    return sorted(every, key=lambda one: by_definition(model, one))


@pytest.mark.parametrize("remove", [1, 2, 4])
def test_all_sets_in_their_order(remove: int) -> None:
    model = model_of(7, seed=remove)
    found = list(model.cheapest(remove))
    assert found == all_sets(model, remove)
    assert model.change(found[0]) == pytest.approx(by_definition(model, found[0]))


@pytest.mark.parametrize("seed", range(5))
def test_where_there_are_too_many_swaps_find_the_best(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(12, seed)
    monkeypatch.setattr(gates, "EXACT_UP_TO", 1)
    found = list(itertools.islice(model.cheapest(5), 8))
    assert found == all_sets(model, 5)[:8]


class Counted:
    """An engine whose loss is a quadratic function of its gates."""

    device = torch.device("cpu")

    def __init__(self, model: QuadraticModel, fails_at: int | None = None) -> None:
        self.model, self.fails_at, self.settings = model, fails_at, []

    def gate_gradients(self, _: Any, settings: list[dict[int, float]], *__: Any) -> torch.Tensor:
        self.settings.append(settings)
        if len(self.settings) == self.fails_at:
            raise KeyboardInterrupt
        gates_SN = torch.ones(len(settings), len(self.model.gradient_N), dtype=torch.float64)
        for number, setting in enumerate(settings):
            for place, gate in setting.items():
                gates_SN[number, place] = gate
        gradients = self.model.gradient_N + (gates_SN - 1) @ self.model.hessian_NN
        lowest = min((min(setting) for setting in settings if setting), default=0)
        gradients[:, :lowest] = 0
        return gradients


def derived(engine: Any, file: Path | None = None, key: str = "a") -> QuadraticModel:
    ids = torch.zeros(2, 4, dtype=torch.long)
    return quadratic_model(engine, range(5), text=SharedWindows(ids.tolist()), file=file, key={"key": key})


def test_derivatives_and_what_they_cost(tmp_path: Path) -> None:
    model = model_of(5, seed=0)
    engine = Counted(model)
    found = derived(engine, tmp_path / "gates.jsonl")
    assert torch.allclose(found.gradient_N, model.gradient_N)
    assert torch.allclose(found.hessian_NN, model.hessian_NN)
    assert len(engine.settings) == 6
    assert [len(settings) for settings in engine.settings] == [1, 2, 2, 2, 2, 2]


def test_killed_it_resumes(tmp_path: Path) -> None:
    model, file = model_of(5, seed=1), tmp_path / "gates.jsonl"
    with pytest.raises(KeyboardInterrupt):
        derived(Counted(model, fails_at=4), file)
    with file.open("a") as half_a_line:
        half_a_line.write('{"block": 2, "row": [1.0,')
    again = Counted(model)
    assert torch.allclose(derived(again, file).hessian_NN, model.hessian_NN)
    assert len(again.settings) == 3  # three rows of five
    other = Counted(model)
    derived(other, file, key="another model")
    assert len(other.settings) == 6
