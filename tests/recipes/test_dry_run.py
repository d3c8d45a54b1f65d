"""Dry runs: everything that would fail is found before anything runs, and sizes are foretold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shortstack.cli.app import run as cli
from shortstack.errors import UsageError
from shortstack.families.open_model import open_checkpoint
from shortstack.recipes.dry_run import Rehearsal
from shortstack.recipes.run import run
from tests.evaluation import material as tasks
from tests.retraining.material import texts

Built = Callable[..., Path]


@pytest.fixture
def recipe(built: Built, tmp_path: Path) -> Path:
    text = texts(tmp_path / "text.jsonl")
    tasks.published(tmp_path / "tasks")
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"""\
model: {built("llama")}
steps:
  score: {{data: {text}, samples: 4, seq_len: 16}}
  prune: {{scores: $score, remove: 2}}
  lora: {{stage: retrain lora, data: {text}, rank: 2, merge: false, max_steps: 1, batch: 2, validation: 1,
    micro_batch: 1, cutoff: 16}}
  merge: {{adapter: $lora, save_dtype: bfloat16}}
  cpt: {{stage: retrain cpt, data: {text}, seq_len: 16, batch: 2, micro_batch: 1, max_steps: 1, validation: 2}}
  ppl: {{stage: eval ppl, data: {text}, seq_len: 16}}
  zeroshot: {{stage: eval zeroshot, tasks_dir: tasks, limit: 1}}
"""
    )
    return path


def rehearsal(recipe: Path | str, out: Path, **options: Any) -> Rehearsal:
    found = run(str(recipe), out=out, dry_run=True, **options)
    assert isinstance(found, Rehearsal)
    return found


def test_the_sizes_are_those_of_the_run(recipe: Path, tmp_path: Path) -> None:
    foreseen = rehearsal(recipe, tmp_path / "out")
    assert foreseen.problems == []
    assert foreseen.exit_code == 0
    assert not (tmp_path / "out").exists()
    run(str(recipe), out=tmp_path / "out", quiet=True)
    steps = {step.name: step for step in foreseen.steps}
    for name in ("prune", "merge", "cpt"):
        made = open_checkpoint(tmp_path / "out" / name)
        assert steps[name].nbytes == made.nbytes, name
        assert steps[name].makes.startswith(f"{made.depth} blocks, ")
    adapter = (tmp_path / "out/lora/adapter/adapter_model.safetensors").stat().st_size
    assert steps["lora"].nbytes == pytest.approx(adapter, rel=0.5)
    assert steps["lora"].temporary_nbytes < steps["cpt"].temporary_nbytes
    assert foreseen.needed_bytes >= sum(step.nbytes for step in foreseen.steps)
    again = rehearsal(recipe, tmp_path / "out")
    assert [step.standing for step in again.steps] == ["done"] * 7
    assert "done" in again.to_text()
    changed = rehearsal(recipe, tmp_path / "out", set_=["prune.remove=1"])
    assert any("prune: was made with other settings" in problem for problem in changed.problems)


def test_times_are_the_operations_at_a_measured_rate_and_say_so(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six blocks: the score of ppl runs 6 + 5 + ... + 1 of them on every token, and the head 7 times."""
    import shortstack.benchmark.floors as floors

    asked: list[tuple[int, int]] = []

    def rate(device: Any, dtype: Any, shape: tuple[int, int]) -> float:
        asked.append(shape)
        return 1000.0

    monkeypatch.setattr(floors, "product_rate", rate)
    found = rehearsal(recipe, tmp_path / "out", set_=["ppl.limit=3"])
    steps = {step.name: step for step in found.steps}
    model = open_checkpoint(found.model)
    block, head = model.block_parameters()[0], model.tensors["lm_head.weight"].numel
    assert steps["score"].seconds == pytest.approx(2 * 4 * 16 * (21 * block + 7 * head) / 1000)
    tokens = 3 * 16  # of three windows, by each of four models
    assert steps["ppl"].seconds == pytest.approx(2 * tokens * ((6 + 4 + 4 + 4) * block + 4 * head) / 1000)
    assert len(asked) == 1, "one model has one rate"
    both = rehearsal(recipe, tmp_path / "out", set_=["ppl.limit=3", "ppl.bos=both"])
    assert {step.name: step.seconds for step in both.steps}["ppl"] == pytest.approx(2 * (steps["ppl"].seconds or 0))
    shown = found.to_text()
    assert "time: a lower bound from the matrix products alone, at the rate of one product" in shown
    assert "no time is estimated for lora, cpt: `retrain ... --dry-run` measures three steps" in shown
    assert "no time is estimated for prune, merge: reads and writes files" in shown
    assert "no time is estimated for zeroshot: what it computes is not known beforehand" in shown
    assert {step.name for step in found.steps if step.seconds is not None} == {"score", "ppl"}
    assert json.loads(json.dumps(found.to_json()))["steps"][0]["seconds"] == steps["score"].seconds


def test_texts_that_are_not_here_have_no_time(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = rehearsal(recipe, tmp_path / "out", set_=["ppl.data=wikitext2"])
    assert {step.name: step.seconds for step in found.steps}["ppl"] is None
    assert "no time is estimated for ppl: how long the texts are is not known here" in found.to_text()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["prune.remove=6"], "prune: 6 blocks to remove, but only 5 of 6 are removable"),
        (["prune.plus=true", "prune.remove=1"], "but only 0 of 6 are removable (kept: 0-5)"),
        (["score.seq_len=65"], "score: seq_len is 65, but "),
        (["score.data=nowhere.txt"], "score: nowhere.txt: no such file or folder"),
        (["score.criterion=pppl"], "score: unknown criterion 'pppl'"),
        (["lora.data=nowhere.json"], "lora: nowhere.json: no such file or folder"),
        (["lora.eval_data=nowhere.txt"], "lora: nowhere.txt: no such file or folder"),
        (["ppl.seq_len=1"], "ppl: --seq-len '1': a window has at least 2 tokens"),
        (["ppl.data_dir=nowhere"], "ppl: --data-dir nowhere: no such folder"),
        (["zeroshot.tasks_dir=nowhere"], "zeroshot: tasks_dir nowhere: no such folder"),
        (["ppl.models=nowhere/at/all"], "ppl: nowhere/at/all: no such directory"),
        (["cpt.device=cuda:9"], "cpt: "),
        (["prune.criterion=taylor"], "prune: "),
        (["prune.criterion=taylor"], "the scores hold ppl, not taylor"),
        (["score.criterion=ppl,magnitude"], "the scores hold ppl, magnitude (choose one with --criterion)"),
        (["score.samples=100000"], "100000 windows of 16 tokens need 1600000 tokens"),
        (["lora.micro_batch=3"], "lora: --batch 2 is not a multiple of 3 (--micro-batch)"),
        (["cpt.batch=3", "cpt.micro_batch=2"], "cpt: --batch 3 is not a multiple of 2 (--micro-batch)"),
        (["lora.save_dtype=float16"], "lora: --save-dtype float16: no effect with --no-merge"),
        (["cpt.tokens=many"], "cpt: --tokens 'many' is not a number of tokens"),
    ],
)
def test_what_would_fail_is_found(settings: list[str], problem: str, recipe: Path, tmp_path: Path) -> None:
    found = rehearsal(recipe, tmp_path / "out", set_=settings)
    assert any(problem in one for one in found.problems), found.problems
    assert found.exit_code == 1
    assert "it would not run" in found.to_text()


def test_what_distilling_would_refuse_is_found(built: Built, tmp_path: Path) -> None:
    path = tmp_path / "taught.yaml"
    path.write_text(
        f"model: {built('llama')}\nsteps:\n  retrain:\n    stage: retrain distill\n    teacher: $model\n"
        f"    data: {texts(tmp_path / 'text.jsonl')}\n    batch: 2\n    micro_batch: 1\n    seq_len: 16\n"
    )
    assert rehearsal(path, tmp_path / "out").problems == []
    for settings, problem in (
        (["retrain.rank=2"], "--rank 2: no effect with --train all: there is no adapter"),
        (["retrain.train=lora", "retrain.weight_decay=0.5"], "--weight-decay 0.5: no effect with --train lora"),
        (["retrain.data=null"], "nothing to train on"),
        (["retrain.offline=notes", "retrain.seq_len=null"], "--offline has data and teacher"),
        (["retrain.batch=3", "retrain.micro_batch=2"], "--batch 3 is not a multiple of 2"),
    ):
        found = rehearsal(path, tmp_path / "out", set_=settings).problems
        assert any(problem in one for one in found), (settings, found)


def test_what_is_set_by_hand_takes_the_place_of_what_it_contradicts(recipe: Path, tmp_path: Path) -> None:
    """A recipe that says scores, a count and `plus: true` can be run with blocks, and with a share."""
    recipe.write_text(recipe.read_text().replace("remove: 2}", "remove: 2, plus: false}"))
    found = rehearsal(recipe, tmp_path / "out", set_=["prune.blocks=1,2,3"])
    assert found.problems == []
    assert "prune: blocks replaces scores, remove, plus" in found.notes
    assert found.steps[1].makes.startswith("3 blocks")
    found = rehearsal(recipe, tmp_path / "out", set_=["prune.ratio=0.3"])
    assert found.problems == []
    assert "prune: ratio replaces remove" in found.notes
    both = rehearsal(recipe, tmp_path / "out", set_=["prune.ratio=0.3", "prune.remove=1"])
    assert any("give one of --remove, --ratio, --params" in one for one in both.problems)


def test_a_model_that_is_not_there(recipe: Path, tmp_path: Path) -> None:
    found = rehearsal(recipe, tmp_path / "out", model=str(tmp_path / "nowhere"))
    assert any("no such directory" in one for one in found.problems)


def test_a_disk_that_is_too_small(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=1000))
    assert any("needed, 1 kB free" in one for one in rehearsal(recipe, tmp_path / "out").problems)


def test_missing_packages(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("peft", "lm_eval") else real(name))
    found = rehearsal(recipe, tmp_path / "out").problems
    assert "lora: needs peft (pip install 'shortstack[retrain]')" in found
    assert "zeroshot: needs lm_eval (pip install 'shortstack[eval]')" in found


def test_scores_and_plans_from_files(recipe: Path, built: Built, tmp_path: Path) -> None:
    (tmp_path / "block_order.csv").write_text("2,3,1,0,4,5\n")
    text = recipe.read_text().replace("$score", "block_order.csv")
    recipe.write_text(text)
    foreseen = rehearsal(recipe, tmp_path / "out", set_=["score=null"])
    assert foreseen.problems == []
    recipe.write_text(f"model: {built('llama')}\nsteps:\n  plan: {{blocks: '1,4'}}\n  prune: {{plan: $plan}}\n")
    steps = rehearsal(recipe, tmp_path / "out").steps
    assert [step.makes.split(",")[0] for step in steps] == ["4 blocks", "4 blocks"]


def test_repeated_pruning_and_shares(recipe: Path, built: Built, tmp_path: Path) -> None:
    recipe.write_text(
        f"model: {built('llama')}\nsteps:\n  prune: {{blocks: '1'}}\n  score: {{criterion: magnitude}}\n"
        "  again: {stage: prune, scores: $score, ratio: 0.3}\n"
    )
    foreseen = rehearsal(recipe, tmp_path / "out")
    assert foreseen.problems == []
    run(str(recipe), out=tmp_path / "out", quiet=True)
    assert foreseen.steps[2].nbytes == open_checkpoint(tmp_path / "out/again").nbytes


def test_what_cannot_be_looked_at_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the published pipelines are tried on a machine without the hub."""
    assert (
        cli(["run", "llama-1-7b-ppl", "--model", "embedded", "--out", str(tmp_path / "o"), "--dry-run", "--json"]) == 0
    )
    record = json.loads(capsys.readouterr().out)
    assert record["would_run"]
    assert any(note.startswith("bookcorpus was not looked at: ") for note in record["notes"])
    assert [step["name"] for step in record["steps"]][:4] == ["score", "prune", "lora", "merge"]
    assert record["steps"][2]["options"]["lr"] == 1e-4
    assert not (tmp_path / "o").exists()


def test_a_set_that_the_hub_does_not_have(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    from tests.hub_server import serving

    with serving({}) as (endpoint, _):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        found = rehearsal(recipe, tmp_path / "out", set_=["score.data=org/nothing"])
    assert any(one.startswith("score: org/nothing: ") for one in found.problems), found


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("lora.rank=0", "--rank 0"),
        ("score.max_samples=100", "--max-samples 100: no effect without --until stable"),
        ("lora.tokens=1M", "--epochs"),
    ],
)
def test_what_the_options_themselves_refuse(changed: str, message: str, recipe: Path, tmp_path: Path) -> None:
    """Also before a real run begins, which would stop midway."""
    changes = [changed, *(["lora.epochs=3"] if "tokens" in changed else [])]
    found = [problem for problem in rehearsal(recipe, tmp_path / "out", set_=changes).problems if message in problem]
    assert found
    if "lora" in changed:
        with pytest.raises(UsageError, match="step lora: .*no effect|step lora: .*expected"):
            run(str(recipe), out=tmp_path / "out", set_=changes, quiet=True)
        assert not (tmp_path / "out").exists()
