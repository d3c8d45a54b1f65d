"""The other shipped recipes, each run whole: other ratios, continued pretraining, evaluations."""

from __future__ import annotations

import pytest

from shortstack.recipes.drafting import shipped_recipes
from tests.recipes.shipped import Bench
from tests.recipes.test_published_values import PIPELINES

OTHERS = [name for name in shipped_recipes() if name != "quickstart" and (name not in PIPELINES or "remove" in name)]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize("name", OTHERS)
def test_a_recipe_from_end_to_end(name: str, bench: Bench) -> None:
    bench.run(name)
