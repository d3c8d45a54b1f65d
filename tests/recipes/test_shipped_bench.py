"""The recipes that measure efficiency, each run whole on pico models of their family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shortstack.recipes.resolve import resolve
from shortstack.recipes.run import RunResult, run
from tests.recipes import material
from tests.recipes.test_published_values import BENCHES


@pytest.mark.parametrize("name", BENCHES)
def test_a_recipe_from_end_to_end(name: str, tmp_path: Path) -> None:
    recipe = resolve(name)
    dense = material.model(tmp_path / "dense", recipe.model, 6)
    beside = [
        material.model(tmp_path / one.split("/")[1], one, 6 - at) for at, one in enumerate(BENCHES[name][1], start=1)
    ]
    models = f"[$model, {', '.join(map(str, beside))}]"
    # The process of its own that measures memory is for tests/benchmark/test_memory.py.
    small = {"batch": "1,2", "new_tokens": "4,5", "runs": 3, "warmup": 1, "memory": "false"}
    settings = [f"bench.models={models}", *(f"bench.{key}={value}" for key, value in small.items())]
    result = run(name, model=str(dense), out=tmp_path / "out", set_=settings, quiet=True)
    assert isinstance(result, RunResult)
    assert [step.state for step in result.steps] == ["done", "done"]
    found = json.loads((tmp_path / "out/bench/results.json").read_text())
    assert len(found) == 4 * (1 + len(beside))
    assert all(one["figures"]["latency"]["value"] > 0 for one in found)
    assert all("latency_speedup" in one["figures"] for one in found if one["model"] != str(dense))
    for path in (dense, *beside):
        assert (tmp_path / f"out/bench/csv/{path.name}/batch_gen_out5_bs2/latency_throughput.csv").is_file()
