"""The other shipped recipes, each run whole: other ratios, continued pretraining, evaluations."""

from __future__ import annotations

import pytest

from shortstack.recipes.merge import shipped_recipes
from shortstack.recipes.resolve import resolve
from tests.recipes.shipped import Bench, looked_ahead
from tests.recipes.test_published_values import BENCHES, PIPELINES

OTHERS = [
    name
    for name in shipped_recipes()
    if name not in ("quickstart", "any-light", "best-25", "best-50", *BENCHES)
    and (name not in PIPELINES or "remove" in name)
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


# Recipes that differ from one that is run in a ratio alone are run whole in the long form; what they would do is looked at.
ALIKE = {
    name
    for name in OTHERS
    if ("remove" in name and name not in ("vicuna-7b-ppl-remove-11", "catppt-base-taylor-remove-9"))
    or ("cpt" in name and name.endswith(("-45", "-60")))
}


def shorter(name: str) -> list[str]:
    """Even shorter where the recipe has the step: what differs from the scripts' recipes is not there."""
    settings = {
        "score": ["score.samples=4"],
        "lora": ["lora.eval_data=null", "lora.eval_windows=null"],
        "zeroshot": ["zeroshot.tasks=boolq,piqa"],
    }
    steps = [step.name for step in resolve(name).steps]
    return [one for step, given in settings.items() if step in steps for one in given]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in ALIKE else []) for name in OTHERS]
)
def test_a_recipe_from_end_to_end(name: str, bench: Bench) -> None:
    result = bench.run(name, *shorter(name))
    assert {step.state for step in result.steps} == {"done"}


@pytest.mark.parametrize("name", sorted(ALIKE))
def test_a_recipe_would_run(name: str, bench: Bench) -> None:
    """Everything that would fail before a step computes, on the same models and data; and what would be made."""
    found = bench.rehearsed(name, *shorter(name))
    assert found.problems == []
    looked_ahead(resolve(name), found)
