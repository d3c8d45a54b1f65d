"""The recipes that lose least at a quarter and at half: search, repair, block by block, LoRA, for any model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import shortstack
from shortstack.families.open_model import open_checkpoint
from shortstack.recipes.resolve import Reference, resolve
from tests import pico
from tests.retraining.material import instructions, texts

STEPS = ["search", "prune", "local", "heal", "ppl", "card", "compare", "report"]
SHORT = [
    "search.samples=4", "search.seq_len=16", "prune.samples=4", "prune.seq_len=16", "local.tokens=256", "local.seq_len=32",
    "local.batch=2", "local.micro_batch=2", "local.validation=2", "heal.max_steps=2", "heal.batch=2", "heal.micro_batch=2",
    "heal.cutoff=200", "heal.validation=2", "ppl.seq_len=16",
]  # fmt: skip
# What each step does, in both; by hand.
VALUES: dict[str, dict[str, Any]] = {
    "search": {"selection": "greedy", "data": "wikitext2", "samples": 32, "seq_len": 128, "model": Reference("model")},
    "prune": {"model": Reference("model"), "plan": Reference("search"), "repair": "auto", "data": "wikitext2"},
    "local": {
        "model": Reference("prune"), "of": Reference("model"), "data": "c4", "tokens": "1M", "seq_len": 512,
        "radius": "all", "lr": 1e-3, "batch": 8, "micro_batch": 4, "validation": 32,
    },
    "heal": {
        "model": Reference("local"), "data": "alpaca-cleaned", "lr": 2e-4, "max_steps": 300, "batch": 32,
        "micro_batch": 4, "cutoff": 256, "warmup": 20, "validation": 200, "eval_every": 100, "save_every": 100,
    },
    "ppl": {
        "models": [Reference(name) for name in ("model", "prune", "local", "heal")], "data": "wikitext2,ptb",
        "seq_len": "128", "limit": 500,
    },
    "card": {"directory": Reference("heal"), "results": [Reference("ppl")]},
    "compare": {"results": [Reference("ppl")]},
    "report": {"sources": [Reference("run")]},
}  # fmt: skip


@pytest.mark.parametrize(("name", "ratio"), [("best-25", 0.25), ("best-50", 0.5)])
def test_what_they_do(name: str, ratio: float) -> None:
    steps = {step.name: step.values for step in resolve(name, model="embedded").steps}
    expected = {**VALUES, "search": {**VALUES["search"], "ratio": ratio}}
    assert list(steps) == STEPS
    assert steps == expected


def test_a_model_goes_the_whole_way(tmp_path: Path) -> None:
    model, out = pico.build(tmp_path / "model", max_position_embeddings=256), tmp_path / "out"
    text = texts(tmp_path / "text.jsonl", rows=30)
    changes = [
        *SHORT, f"search.data={text}", f"prune.data={text}", f"local.data={text}",
        f"heal.data={instructions(tmp_path / 'rows.json')}", f"ppl.data={texts(tmp_path / 'unseen.jsonl', rows=8, seed=1)}",
    ]  # fmt: skip
    result = shortstack.run("best-50", model=str(model), out=out, set_=changes, quiet=True)
    assert [step.name for step in result.steps] == STEPS
    depths = [open_checkpoint(path).depth for path in (model, out / "prune", out / "local", out / "heal")]
    assert depths[0] > depths[1] == depths[2] == depths[3]
    record = json.loads((out / "heal/shortstack.json").read_text())
    assert [step["stage"] for step in record["steps"]] == ["prune", "repair", "retrain", "retrain"]
    assert [step.get("method") for step in record["steps"][2:]] == ["local", "lora"]
    again = shortstack.run("best-50", model=str(model), out=out, set_=changes, quiet=True)
    assert {step.state for step in again.steps} == {"skipped"}
