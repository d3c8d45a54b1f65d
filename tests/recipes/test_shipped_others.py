"""The other shipped recipes, each run whole: other ratios, continued pretraining, evaluations."""

from __future__ import annotations

import pytest

from shortstack.recipes.merge import shipped_recipes
from shortstack.recipes.resolve import resolve
from tests.recipes.shipped import Bench
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


@pytest.mark.parametrize("name", OTHERS)
def test_a_recipe_from_end_to_end(name: str, bench: Bench) -> None:
    # Even shorter where the recipe has the step: what differs from the scripts' recipes is not there.
    shorter = {
        "score": ["score.samples=4"],
        "lora": ["lora.eval_data=null", "lora.eval_windows=null"],
        "zeroshot": ["zeroshot.tasks=boolq,piqa"],
    }
    steps = [step.name for step in resolve(name).steps]
    bench.run(name, *(setting for step, settings in shorter.items() if step in steps for setting in settings))
