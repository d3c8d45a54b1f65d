"""The recipe for any model: score, prune, heal, measure, card and report, whatever the family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import shortstack
from shortstack.cli.app import run as cli
from shortstack.errors import ShortstackError
from shortstack.families.open_model import open_checkpoint
from shortstack.publishing.card_text import carried_over
from shortstack.recipes.resolve import Reference, resolve
from shortstack.recipes.run import RunResult
from tests import pico
from tests.benchmark.material import measure_memory_here
from tests.retraining.material import instructions, texts

RECIPE = "any-light"
STEPS = ["score", "prune", "heal", "ppl", "bench", "card", "compare", "report"]
SHORT = [
    "score.samples=4", "score.seq_len=16", "prune.ratio=0.3", "heal.max_steps=2", "heal.batch=2", "heal.micro_batch=2",
    "heal.cutoff=200", "heal.validation=2", "ppl.seq_len=16", "bench.batch=1", "bench.prompt_tokens=4", "bench.new_tokens=2",
    "bench.runs=1", "bench.warmup=0",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _memory_here(monkeypatch: pytest.MonkeyPatch) -> None:
    measure_memory_here(monkeypatch)


def settings(folder: Path) -> list[str]:
    """`--set`s that point the recipe to texts of this test's own, and make it short."""
    folder.mkdir(exist_ok=True)
    rows, text = instructions(folder / "rows.json"), texts(folder / "text.jsonl", rows=30)
    return [
        *SHORT,
        f"score.data={text}",
        f"heal.data={rows}",
        f"ppl.data={texts(folder / 'unseen.jsonl', rows=8, seed=1)}",
    ]


def done(model: Path | str, out: Path, changes: list[str], **options: Any) -> RunResult:
    result = shortstack.run(RECIPE, model=str(model), out=out, set_=changes, quiet=True, **options)
    assert isinstance(result, RunResult)
    return result


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(one, marks=pytest.mark.slow) for one in ("gpt2", "mixtral"))]
)
def test_any_family_goes_the_whole_way(family: str, tmp_path: Path) -> None:
    positions = {"n_positions" if family == "gpt2" else "max_position_embeddings": 256}
    model, out = pico.build(tmp_path / "model", family, **positions), tmp_path / "out"
    changes = settings(tmp_path / "data")
    result = done(model, out, changes)
    assert [step.name for step in result.steps] == STEPS
    depths = [open_checkpoint(path).depth for path in (model, out / "prune", out / "heal")]
    assert depths[0] > depths[1] == depths[2]
    looked_at(out)
    again = done(model, out, changes)  # the card, which is written again in place, changes nothing else
    assert {step.state for step in again.steps} == {"skipped"}


def looked_at(out: Path) -> None:
    """The healed checkpoint loads elsewhere, and its card and the report show what was measured."""
    measured = {Path(one["model"]).name: one["figures"] for one in json.loads((out / "ppl/results.json").read_text())}
    assert len(measured) == 3
    ppl = next(figure["value"] for figure in measured["heal"].values() if figure["unit"] == "ppl")
    card, page = (out / "heal/README.md").read_text(), (out / "report/report.html").read_text()
    assert f"{ppl:.4g}" in page
    assert f"{ppl:.4g}" in card or f"{ppl:.2f}" in card
    assert "latency" in card.lower()
    assert carried_over(out / "heal/README.md") is not None
    sha = json.loads((out / "heal/shortstack.json").read_text())["files"]["README.md"]
    assert len(sha) == 64
    model = AutoModelForCausalLM.from_pretrained(out / "heal", dtype=torch.float32)
    with torch.no_grad():
        assert bool(torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all())


@pytest.mark.slow
def test_the_model_in_the_package_goes_the_whole_way(tmp_path: Path) -> None:
    data = [
        "score.data=embedded",
        *(one for one in settings(tmp_path / "data") if not one.startswith(("score", "prune"))),
    ]
    result = done("embedded", tmp_path / "out", data)
    assert open_checkpoint(tmp_path / "out/prune").depth == 11  # a tenth of the parameters is one of its twelve blocks
    assert [step.name for step in result.steps] == STEPS
    looked_at(tmp_path / "out")


def test_what_it_does_to_a_model() -> None:
    steps = {step.name: step for step in resolve(RECIPE, model="embedded").steps}
    assert list(steps) == STEPS
    assert steps["prune"].values["ratio"] == 0.1
    assert steps["ppl"].values["models"] == [Reference("model"), Reference("prune"), Reference("heal")]
    assert steps["card"].values == {"directory": Reference("heal"), "results": [Reference("ppl"), Reference("bench")]}


def test_it_is_shown_without_a_model_and_not_run_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["recipes", RECIPE]) == 0
    shown = capsys.readouterr().out
    assert "ratio: 0.1" in shown
    assert "\nmodel:" not in shown
    assert cli(["run", RECIPE]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: any-light: has no model to begin with",
        "hint: --model MODEL",
    ]


def written(folder: Path, steps: str) -> str:
    path = folder / "r.yaml"
    path.write_text(f"model: embedded\nsteps:\n  prune: {{blocks: '5'}}\n{steps}")
    return str(path)


@pytest.mark.parametrize("directory", ["$model", "somewhere"])
def test_a_recipe_renews_no_card_but_of_what_it_made(directory: str, tmp_path: Path) -> None:
    with pytest.raises(ShortstackError, match="which is not an output of this run"):
        resolve(written(tmp_path, f"  card: {{directory: {directory}, results: [ppl.json]}}\n"))
    assert resolve(written(tmp_path, "  card: {results: [ppl.json]}\n")).steps[-1].values["directory"] == Reference(
        "prune"
    )


def test_a_card_that_was_edited_is_kept(tmp_path: Path) -> None:
    """Another set of figures would replace it: only --force does."""
    model = pico.build(tmp_path / "model", "llama")
    text, recipe, out = texts(tmp_path / "t.jsonl"), tmp_path / "r.yaml", tmp_path / "out"
    recipe.write_text(
        f"model: {model}\nsteps:\n  prune: {{blocks: '2'}}\n"
        f"  ppl: {{stage: eval ppl, data: {text}, seq_len: 16}}\n  card: {{results: [$ppl]}}\n"
    )
    shortstack.run(str(recipe), out=out, quiet=True)
    card = out / "prune/README.md"
    card.write_text(card.read_text() + "\nMy own words.\n")
    with pytest.raises(ShortstackError, match=r"README\.md: was edited since it was written"):
        shortstack.run(str(recipe), out=out, from_="card", quiet=True)
    assert card.read_text().endswith("My own words.\n")
    shortstack.run(str(recipe), out=out, from_="card", force=True, quiet=True)
    assert "My own words" not in card.read_text()
