"""Shipped recipes, run whole on pico models of their family, with data of the same form; and what must be true then."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shortstack.families.open_model import open_checkpoint
from shortstack.recipes.dry_run import Rehearsal
from shortstack.recipes.resolve import Recipe, resolve
from shortstack.recipes.run import RunResult, run
from tests.recipes import material


class Bench:
    """Models and data, made once for all recipes of a test file."""

    def __init__(self, folder: Path, *, full_depth: bool = False) -> None:
        self.folder = folder
        self.full_depth = full_depth
        self.places = material.data(folder / "data")
        gc.freeze()
        self._models: dict[str, Path] = {}

    def model(self, recipe: Recipe) -> Path:
        """A model that the recipe begins with: deep enough for what it removes, or as deep as the published one."""
        removed = next((int(step.values["remove"]) for step in recipe.steps if "remove" in step.values), 0)
        blocks = None if self.full_depth else removed + 7
        wide = {"hidden_size": 32, "intermediate_size": 32, "head_dim": 16} if in_groups(recipe) else {}
        name = f"{recipe.model.replace('/', '_')}-{blocks}{'-wide' * bool(wide)}"
        if name not in self._models:
            self._models[name] = material.model(self.folder / "models" / name, recipe.model, blocks, **wide)
        return self._models[name]

    def run(self, name: str, *more: str) -> RunResult:
        """Run a recipe and look at everything that it left."""
        recipe = resolve(name)
        result = self._called(recipe, *more, quiet=True)
        assert isinstance(result, RunResult)
        assert [step.name for step in result.steps] == [step.name for step in recipe.steps]
        looked_at(recipe, self.folder / "runs" / name, result)
        return result

    def rehearsed(self, name: str, *more: str) -> Rehearsal:
        """What it would do."""
        found = self._called(resolve(name), *more, dry_run=True)
        assert isinstance(found, Rehearsal)
        return found

    def _called(self, recipe: Recipe, *more: str, **how: bool) -> RunResult | Rehearsal:
        missing = sorted({package for step in recipe.steps for package in step.command.missing})
        if missing:
            pytest.skip(f"{', '.join(missing)} is not installed")
        settings = material.shortened({step.name: step.command.name for step in recipe.steps}, self.places)
        out = self.folder / "runs" / recipe.name
        return run(recipe.name, model=str(self.model(recipe)), out=out, set_=[*settings, *more], **how)


def looked_ahead(recipe: Recipe, found: Rehearsal) -> None:
    """A dry run names every step, what the cut leaves, and how long measuring takes."""
    assert [step.name for step in found.steps] == [step.name for step in recipe.steps]
    values, made = {step.name: step.values for step in recipe.steps}, {step.name: step for step in found.steps}
    depth = open_checkpoint(found.model).depth - values.get("prune", {}).get("remove", 0)
    for step in {"prune", "merge", "cpt"} & set(made):
        assert made[step].makes.startswith(f"{depth} blocks, ")
        assert made[step].nbytes > 0
    assert (made["ppl"].seconds or 0) > 0


def in_groups(recipe: Recipe) -> bool:
    """Whether weights share scales, which takes at least 32 of them in a row."""
    return any(step.command.name == "quantize" for step in recipe.steps)


def looked_at(recipe: Recipe, out: Path, result: RunResult) -> None:
    values = {step.name: step.values for step in recipe.steps}
    if "prune" in values:
        pruned_as_published(recipe, out, values)
    if "quantize" in values:
        quantized_as_published(recipe, out)
    figures = {one["model"]: one["figures"] for one in json.loads((out / "ppl/results.json").read_text())}
    assert len(figures) == len(values["ppl"]["models"])
    assert all(figure["ppl_128"]["value"] > 1 for figure in figures.values())
    tasks = json.loads((out / "zeroshot/results.json").read_text())
    rows = tasks if isinstance(tasks, list) else [tasks]
    assert all("AVE" in one["figures"] and one["settings"]["limit"] == 2 for one in rows)
    for table in (
        "ppl/csv/*/ppl.csv",
        "ppl/csv/*/ppl_bos.csv",
        "zeroshot/csv/*/*_acc.csv",
        "samples/csv/*/gen_text.txt",
    ):
        assert len(list(out.glob(table))) == len(values["ppl"]["models"])
    if "compare" in values:
        for name in str(values["compare"].get("published") or "").split(","):
            assert name in next(step.text for step in result.steps if step.name == "compare")
            assert f"published {name}" in (out / "report/report.html").read_text()
    assert "report/report.html" in result.to_text()


def pruned_as_published(recipe: Recipe, out: Path, values: dict[str, dict[str, Any]]) -> None:
    record = json.loads((out / "score/scores.json").read_text())
    (criterion,) = record["criteria"].values()
    blocks = record["model"]["blocks"]
    protected = {0, 1, 2, 3, blocks - 2, blocks - 1}
    removed = [block for block in criterion["order"] if block not in protected][: values["prune"]["remove"]]
    pruned = open_checkpoint(out / "prune")
    assert sorted(removed) == sorted(set(range(blocks)) - set(pruned.original_blocks))
    if "magnitude" not in recipe.name:
        assert record["calibration"]["sampling"] == "published"
        assert record["calibration"]["bos_every"] is ("gemma" in recipe.name)
        assert record["calibration"]["samples"] in (10, 4)
    assert list((out / "score/csv").glob("*/block_order.csv"))
    last = "merge" if "merge" in values else "cpt"
    made = open_checkpoint(out / last)
    assert made.depth == blocks - values["prune"]["remove"]
    stages = [step["stage"] for step in (made.provenance or {})["steps"]]
    assert stages == {"merge": ["prune", "merge"], "cpt": ["prune", "retrain"]}[last] or "cpt" in values
    if last == "merge":
        expected = "BF16" if values["merge"]["save_dtype"] == "bfloat16" else "F16"
        assert {tensor.dtype for tensor in made.tensors.values()} == {expected}
        assert (out / "lora/adapter/adapter_model.safetensors").is_file()
    loads_elsewhere(out / last, recipe)


def quantized_as_published(recipe: Recipe, out: Path) -> None:
    config = json.loads((out / "quantize/config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    assert (group["weights"]["num_bits"], group["weights"]["group_size"]) == (4, 32)
    step = (open_checkpoint(out / "quantize").provenance or {})["steps"][-1]
    assert (step["calibration"]["sampling"], step["calibration"]["seed"]) == ("joined", 0)
    loads_elsewhere(out / "quantize", recipe)


def loads_elsewhere(path: Path, recipe: Recipe) -> None:
    """With transformers alone: weights, tokenizer, and the special tokens that the family has."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer("the block", return_tensors="pt")["input_ids"]
    assert int(ids[0, 0]) == tokenizer.bos_token_id == model.config.bos_token_id
    if "llama-1" in recipe.name:  # the published copy of LLaMA-1 has 0 and 1 here
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
        assert (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id) == (0, 1, 2)
    with torch.no_grad():
        assert bool(torch.isfinite(model(ids).logits).all())
