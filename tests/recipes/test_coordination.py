"""Several processes share the training of a run and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.kills import Warm
from tests.recipes.runs import done
from tests.retraining.processes import launched


def trained_twice(recipe: Path) -> Path:
    """Two trainings one after another, as CPT and then LoRA."""
    small = "seq_len: 16, batch: 2, micro_batch: 1, max_steps: 1, validation: 2"
    more = f"  again: {{stage: retrain cpt, data: text.jsonl, {small}}}\n"
    recipe.write_text(recipe.read_text().replace("  ppl:", f"{more}  ppl:"))
    return recipe


def test_several_processes_share_the_training_and_nothing_else(recipe: Path, warm: Warm, tmp_path: Path) -> None:
    """In processes that have everything imported, with the environment that torchrun gives them."""
    out, log = tmp_path / "out", tmp_path / "log.txt"
    assert warm.run(["run", str(trained_twice(recipe)), "--out", str(out)], log, processes=2)["code"] == 0, (
        log.read_text()
    )
    check_shared(out, log.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_launched_processes_share_the_training_and_nothing_else(kind: str, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = launched(kind, 2, ["run", str(trained_twice(recipe)), "--out", str(out)], tmp_path)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    check_shared(out, said)


def check_shared(out: Path, said: str) -> None:
    assert said.count("1/7 score") == 1
    for step in ("cpt", "again"):
        record = json.loads((out / step / "shortstack.json").read_text())["steps"][-1]
        assert record["processes"] == 2
    assert json.loads((out / "run.json").read_text())["steps"]["compare"]["state"] == "done"


@pytest.mark.slow
def test_several_processes_pass_by_what_is_done(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done(recipe, out)
    again = launched("ddp", 2, ["run", str(recipe), "--out", str(out)], tmp_path)
    said, _ = again.communicate(timeout=240)
    assert again.returncode == 0, said
    assert "3/6 cpt: done by an earlier run" in said


@pytest.mark.slow
def test_a_step_that_fails_ends_all_processes(recipe: Path, tmp_path: Path) -> None:
    process = launched(
        "ddp", 2, ["run", str(recipe), "--out", str(tmp_path / "out"), "--set", "prune.remove=9"], tmp_path
    )
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "error: step prune: 9 blocks to remove, but only 5 of 6 are removable" in said
