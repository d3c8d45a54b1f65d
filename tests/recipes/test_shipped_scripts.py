"""The twenty published scripts as recipes: one of each model is run whole, and in the long form all of them are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from shortstack.families.open_model import open_checkpoint
from shortstack.recipes.resolve import resolve
from tests.checkpoint.test_hub import shortstack
from tests.hub_server import serving
from tests.recipes.shipped import Bench, looked_ahead
from tests.recipes.test_published_values import PIPELINES
from tests.retraining.test_hub_datasets import parquet

SCRIPTS = [name for name in PIPELINES if "remove" not in name]
# Of each model one, of each criterion some; the others differ from them in the criterion alone.
WHOLE = {
    "llama-1-7b-ppl", "llama-2-7b-taylor", "llama-3-8b-ppl", "vicuna-7b-taylor", "vicuna-13b-magnitude",
    "catppt-base-magnitude", "gemma-2b-taylor", "gemma-7b-ppl",
}  # fmt: skip


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in WHOLE else [pytest.mark.slow]) for name in SCRIPTS]
)
def test_a_published_script_from_end_to_end(name: str, bench: Bench) -> None:
    result = bench.run(name)
    assert {step.state for step in result.steps} == {"done"}


@pytest.mark.parametrize("name", sorted(set(SCRIPTS) - WHOLE))
def test_a_published_script_would_run(name: str, bench: Bench) -> None:
    """Everything that would fail before a step computes, on the same models and data; and what would be made."""
    found = bench.rehearsed(name)
    assert found.problems == []
    looked_ahead(resolve(name), found)


def test_every_model_and_every_criterion_is_run_whole() -> None:
    for place in (0, 1):
        assert {PIPELINES[name][place] for name in WHOLE} == {PIPELINES[name][place] for name in SCRIPTS}


def test_the_pickled_llama_with_wrong_ids_is_what_the_first_recipe_ran_on(bench: Bench) -> None:
    model = bench.model(resolve("llama-1-7b-ppl"))
    assert sorted(path.suffix for path in model.glob("pytorch_model*")) == [".bin", ".bin", ".bin", ".json"]
    config = json.loads((model / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 1)
    record = open_checkpoint(bench.folder / "runs/llama-1-7b-ppl/prune").provenance
    assert record is not None
    assert record["steps"][0]["repairs"] == ["decapoda-token-ids"]


def test_from_the_hub_by_names_alone(bench: Bench, tmp_path: Path) -> None:
    """As a user with a network runs it: model and sets come from a server that speaks the hub's protocol."""
    texts = bench.places["texts"]
    rows = {name: [{column: line} for line in (texts / file).read_text().splitlines()] for name, column, file in (
        ("wikitext/wikitext-2-raw-v1/test-00000-of-00001.parquet", "text", "wikitext2/wiki.test.raw"),
        ("ptb/penn_treebank/validation/0000.parquet", "sentence", "ptb/ptb.valid.txt"),
    )}  # fmt: skip
    for name, found in rows.items():
        parquet(tmp_path / name, found)
    (tmp_path / "books/plain_text/train").mkdir(parents=True)
    shutil.copy(bench.places["bookcorpus"] / "0000.parquet", tmp_path / "books/plain_text/train/0000.parquet")
    (tmp_path / "alpaca").mkdir()
    shutil.copy(bench.places["alpaca-cleaned"], tmp_path / "alpaca/alpaca_data_cleaned.json")
    repositories = {
        "lmsys/vicuna-7b-v1.3": bench.model(resolve("vicuna-7b-ppl")), "datasets/Salesforce/wikitext": tmp_path / "wikitext",
        "datasets/ptb-text-only/ptb_text_only": tmp_path / "ptb", "datasets/bookcorpus/bookcorpus": tmp_path / "books",
        "datasets/yahma/alpaca-cleaned": tmp_path / "alpaca",
    }  # fmt: skip
    settings = ["lora.validation=4", "lora.max_steps=1", "lora.batch=2", "lora.micro_batch=2", "lora.eval_windows=1",
                f"zeroshot.tasks_dir={bench.places['tasks']}", "zeroshot.limit=2", "samples.new_tokens=4"]  # fmt: skip
    command = [
        "run",
        "vicuna-7b-ppl",
        "--out",
        str(tmp_path / "out"),
        *(part for one in settings for part in ("--set", one)),
    ]
    with serving(repositories) as (endpoint, _):
        tried = shortstack(endpoint, tmp_path / "home", *command, "--dry-run")
        assert tried.returncode == 0, tried.stdout + tried.stderr
        assert "bookcorpus comes from the hub when it is needed" in tried.stdout
        done = shortstack(endpoint, tmp_path / "home", *command)
    assert done.returncode == 0, done.stderr
    assert "published vicuna-7b-v1.3" in done.stdout
    assert len(json.loads((tmp_path / "out/ppl/results.json").read_text())) == 6


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_in_the_long_form(name: str, tmp_path: Path) -> None:
    """On models of the published depth, with the published numbers of epochs and samples."""
    long = Bench(tmp_path, full_depth=True)
    full = ("lora.max_steps=null", "samples.count=null", "samples.new_tokens=null", "lora.eval_windows=null")
    assert {step.state for step in long.run(name, *full).steps} == {"done"}
