"""The twenty published scripts as recipes, each run whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shortstack.checkpoint.reader import open_checkpoint
from shortstack.recipes.resolving import resolve
from tests.recipes.shipped import Bench
from tests.recipes.test_published_values import PIPELINES

SCRIPTS = [name for name in PIPELINES if "remove" not in name]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_published_script_from_end_to_end(name: str, bench: Bench) -> None:
    bench.run(name)


def test_the_pickled_llama_with_wrong_ids_is_what_the_first_recipe_ran_on(bench: Bench) -> None:
    model = bench.model(resolve("llama-1-7b-ppl").model)
    assert sorted(path.suffix for path in model.glob("pytorch_model*")) == [".bin", ".bin", ".bin", ".json"]
    config = json.loads((model / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 1)
    record = open_checkpoint(bench.folder / "runs/llama-1-7b-ppl/prune").provenance
    assert record is not None
    assert record["steps"][0]["repairs"] == ["decapoda-token-ids"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_in_the_long_form(name: str, tmp_path: Path, bench: Bench) -> None:
    """With the published numbers of epochs and samples, and all rows of the tasks that there are."""
    long = Bench(tmp_path)
    long.run(name, "lora.max_steps=null", "samples.count=null", "samples.new_tokens=null", "lora.eval_windows=null")
