"""Runs: folders, records, what is skipped, what resumes after a kill, and what is refused rather than replaced."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shortstack
from shortstack.cli.app import run as cli
from shortstack.errors import ShortstackError
from shortstack.families.open_model import open_checkpoint
from shortstack.recipes.dry_run import Rehearsal
from shortstack.recipes.run import RunResult, run
from tests.pruning.test_prune import counted_cuts
from tests.retraining.material import texts
from tests.retraining.processes import launched

Built = Callable[..., Path]

RECIPE = """\
about: small, whole
model: {model}
steps:
  score: {{criterion: "ppl,magnitude", data: {text}, samples: 4, seq_len: 16, csv: csv}}
  prune: {{scores: $score, criterion: ppl, remove: 2, verify: true}}
  cpt:
    stage: retrain cpt
    data: {text}
    seq_len: 16
    batch: 2
    micro_batch: 1
    max_steps: 4
    save_every: 1
    validation: 2
  ppl: {{stage: eval ppl, data: {text}, seq_len: 16}}
  check: {{model: $cpt}}
  compare: {{results: [$ppl]}}
"""
STEPS = ["score", "prune", "cpt", "ppl", "check", "compare"]


@pytest.fixture
def recipe(built: Built, tmp_path: Path) -> Path:
    text = texts(tmp_path / "text.jsonl")
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE.format(model=built("llama"), text=text))
    return path


def done(recipe: Path | str, out: Path, **options: Any) -> RunResult:
    found = run(str(recipe), out=out, quiet=True, **options)
    assert isinstance(found, RunResult)
    return found


def states(result: RunResult) -> dict[str, str]:
    return {step.name: step.state for step in result.steps}


def test_a_run_leaves_a_folder_that_a_person_can_read(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = done(recipe, out)
    assert list(states(result).values()) == ["done"] * 6
    left = {path.name for path in out.iterdir()}
    assert left == {"run.json", "recipe.yaml", "logs", *STEPS}
    assert {path.name for path in (out / "logs").iterdir()} == {f"{step}.log" for step in STEPS}
    assert open_checkpoint(out / "prune").depth == open_checkpoint(out / "cpt").depth == 4
    assert (out / "score/csv/ppl_n4/block_order.csv").is_file()
    record = json.loads((out / "run.json").read_text())
    assert record["order"] == STEPS
    assert all(record["steps"][step]["state"] == "done" for step in STEPS)
    assert "logits equal bit for bit" in (out / "logs/prune.log").read_text()
    assert "ppl_16" in (out / "logs/ppl.log").read_text()
    names = [result["model"] for result in json.loads((out / "ppl/results.json").read_text())]
    assert names == [record["model"], str(out / "prune"), str(out / "cpt")]
    text = result.to_text()
    assert "ppl on" in text  # what the last step found
    assert json.loads(json.dumps(result.to_json()))["steps"][2]["stage"] == "retrain cpt"


def test_a_step_works_its_cut_out_once(built: Built, tmp_path: Path) -> None:
    """Though the step plans, writes and verifies."""
    path = tmp_path / "mine.yaml"
    path.write_text(f'about: a cut\nmodel: {built("llama")}\nsteps:\n  prune: {{blocks: "1,4", verify: true}}\n')
    with counted_cuts() as worked_out:
        done(path, tmp_path / "out")
    assert worked_out == ["shortened_config", "shortened_tensors"]


def test_what_is_done_is_passed_by_and_what_is_written_down_runs_the_same(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    first = done(recipe, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    second = done(recipe, out)
    assert set(states(second).values()) == {"skipped"}
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before
    assert second.steps[-1].text == first.steps[-1].text
    assert cli(["run", str(out / "recipe.yaml"), "--out", str(tmp_path / "again"), "--quiet"]) == 0
    one, other = ((folder / "cpt/model.safetensors").read_bytes() for folder in (out, tmp_path / "again"))
    assert one == other


def test_what_is_written_down_names_files_in_full(
    recipe: Path, built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "model").symlink_to(built("llama"))
    monkeypatch.chdir(tmp_path)
    only = [f"{step}=null" for step in STEPS[1:]]
    done("mine.yaml", Path("out"), model="model", set_=[*only, "score.data=text.jsonl"])
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = done("../out/recipe.yaml", Path("out"))
    assert states(again) == {"score": "done"}
    one, other = (json.loads((tmp_path / place / "out/score/scores.json").read_text()) for place in (".", "elsewhere"))
    assert one["criteria"] == other["criteria"]


def test_a_check_that_finds_a_fault_ends_the_run(recipe: Path, copied: Built, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = copied("llama")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    recipe.write_text(f"model: {model}\nsteps:\n  check: {{}}\n  info: {{}}\n")
    with pytest.raises(ShortstackError, match="step check: it found faults"):
        done(recipe, tmp_path / "out")
    assert "logits hold NaN or infinity" in (tmp_path / "out/logs/check.log").read_text()
    assert not (tmp_path / "out/info").exists()


def test_everything_that_makes_a_step_counts(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done(recipe, out, set_=["check=null", "compare=null"])
    kept = {path: path.read_bytes() for path in (out / "cpt").iterdir()}
    for change, message in (
        ({"set_": ["prune.remove=1"]}, r"step prune: was made with other settings .*: options.remove was 2, now 1"),
        (
            {"dtype": "bfloat16"},
            "step score: was made with other settings .*: options.dtype was not there, now bfloat16",
        ),
        ({"model": "embedded"}, "step score: was made with other settings .*: options.model was "),
    ):
        with pytest.raises(ShortstackError, match=message) as caught:
            done(recipe, out, **{"set_": ["check=null", "compare=null"], **change})
        assert "or --force" in caught.value.hint
    with (tmp_path / "text.jsonl").open("a") as stream:
        stream.write('{"text": "another line"}\n')
    with pytest.raises(ShortstackError, match="step score: was made with other settings .*options.data was"):
        done(recipe, out)
    assert {path: path.read_bytes() for path in (out / "cpt").iterdir()} == kept


def test_only_what_changed_and_what_follows_is_made_again(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done(recipe, out)
    again = done(recipe, out, set_=["cpt.max_steps=2"], force=True)
    assert states(again) == dict(zip(STEPS, ["skipped", "skipped", "done", "done", "done", "done"], strict=True))
    assert json.loads((out / "cpt/shortstack.json").read_text())["steps"][-1]["steps"] == 2
    from_ppl = done(recipe, out, set_=["cpt.max_steps=2"], from_="ppl")
    assert list(states(from_ppl).values()) == ["skipped"] * 3 + ["done"] * 3
    with pytest.raises(ShortstackError, match="--from pl: there is no step named 'pl'"):
        done(recipe, out, from_="pl")


def test_an_output_that_was_changed_or_lost(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    small = {"set_": [f"{step}=null" for step in ("cpt", "ppl", "check", "compare")]}
    done(recipe, out, **small)
    scores = out / "score/scores.json"
    original = scores.read_text()
    scores.write_text(original.replace('"seconds"', '"seconds" '))
    with pytest.raises(ShortstackError, match=r"step score: .*scores.json was changed since"):
        done(recipe, out, **small)
    assert scores.read_text() != original  # an edit by hand is not thrown away
    scores.write_text(original)
    (out / "prune/config.json").unlink()
    with pytest.raises(ShortstackError, match="step prune: .*prune was changed since"):
        done(recipe, out, **small)
    import shutil

    shutil.rmtree(out / "prune")
    assert list(states(done(recipe, out, **small)).values()) == ["skipped", "done"]


def test_a_run_folder_moves(recipe: Path, tmp_path: Path) -> None:
    done(recipe, tmp_path / "out", set_=["ppl=null", "compare=null", "check=null"])
    (tmp_path / "out").rename(tmp_path / "moved")
    result = done(recipe, tmp_path / "moved", set_=["ppl=null", "compare=null", "check=null"])
    assert set(states(result).values()) == {"skipped"}


def test_folders_that_are_something_else(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("x")
    with pytest.raises(ShortstackError, match="exists and holds no run of shortstack"):
        done(recipe, out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    (out / "run.json").write_text("{")
    with pytest.raises(ShortstackError, match=r"run.json: cannot be read"):
        done(recipe, out)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ShortstackError, match="exists and is not a directory"):
        done(recipe, tmp_path / "file")
    done(recipe, tmp_path / "other", set_=[f"{step}=null" for step in STEPS[1:]])
    other = recipe.with_name("other.yaml")
    other.write_text(recipe.read_text().replace("small, whole", "another"))
    with pytest.raises(ShortstackError, match=r"holds a run of .*mine.yaml, not of .*other.yaml"):
        done(other, tmp_path / "other")
    foreseen = run(str(other), out=tmp_path / "other", dry_run=True)
    assert isinstance(foreseen, Rehearsal)
    assert any("holds a run of" in problem for problem in foreseen.problems)
    same_name = tmp_path / "elsewhere" / recipe.name
    same_name.parent.mkdir()
    same_name.write_text(other.read_text())
    with pytest.raises(ShortstackError, match=rf"holds a run of {recipe}, not of {same_name}"):
        done(same_name, tmp_path / "other")


@pytest.mark.fault(142)
def test_a_recipe_is_known_by_what_it_is_and_not_by_how_it_is_named(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative, absolute, through a link, as a copy, and from another folder: one run."""
    monkeypatch.chdir(tmp_path)
    only = [f"{step}=null" for step in STEPS[1:]]
    out = tmp_path / "out"
    assert states(done("mine.yaml", out, set_=only)) == {"score": "done"}
    (tmp_path / "link.yaml").symlink_to(recipe)
    (tmp_path / "copy.yaml").write_text(recipe.read_text())
    for name in ("./mine.yaml", str(recipe), "link.yaml", "copy.yaml", str(out / "recipe.yaml")):
        assert states(done(name, out, set_=[] if name.endswith("recipe.yaml") else only)) == {"score": "skipped"}, name
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    recipe.write_text(recipe.read_text().replace("small, whole", "the same file, edited"))
    assert states(done("../mine.yaml", out, set_=only)) == {"score": "skipped"}


def test_what_an_earlier_version_recorded_is_resumed_by_name(recipe: Path, tmp_path: Path) -> None:
    only = [f"{step}=null" for step in STEPS[1:]]
    done(recipe, tmp_path / "out", set_=only)
    record = json.loads((tmp_path / "out/run.json").read_text())
    del record["file"]
    (tmp_path / "out/run.json").write_text(json.dumps(record))
    recipe.write_text(recipe.read_text().replace("small, whole", "edited"))
    assert states(done(recipe, tmp_path / "out", set_=only)) == {"score": "skipped"}


def test_every_result_is_printed_once(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only = ["--set", "cpt=null", "--set", "check=null"]
    command = ["run", str(recipe), "--out", str(tmp_path / "out"), *only]
    assert cli(command) == 0
    shown = capsys.readouterr()
    whole = shown.out + shown.err
    for found in ("logits equal bit for bit", "ppl_16 over", "differences are against"):
        assert whole.count(found) == 1, found
    assert "differences are against" in shown.out
    assert cli(command) == 0
    assert capsys.readouterr().out.count("differences are against") == 1


def test_a_failing_step_is_named_and_those_before_it_stay(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ShortstackError, match="step prune: 9 blocks to remove, but only 5 of 6 are removable"):
        done(recipe, out, set_=["prune.remove=9"])
    log = (out / "logs/prune.log").read_text()
    assert "error: 9 blocks to remove" in log
    with pytest.raises(ShortstackError, match="step prune: was made with other settings"):
        done(recipe, out)
    assert states(done(recipe, out, force=True))["score"] == "skipped"


def test_nothing_runs_before_everything_is_checked(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(recipe.read_text() + "  last: {stage: eval ppl, seq_len: [1]}\n")
    with pytest.raises(ShortstackError, match="seq_len is"):
        done(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_packages_are_asked_for_first(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else real(name))
    with pytest.raises(ShortstackError, match="retrain cpt needs accelerate"):
        done(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_library_has_it_too(recipe: Path, tmp_path: Path) -> None:
    result = shortstack.run(str(recipe), out=tmp_path / "out", set_=[f"{step}=null" for step in STEPS[1:]], quiet=True)
    assert result is not None
    assert result.steps[0].result.criteria.keys() == {"ppl", "magnitude"}


def command(recipe: Path, out: Path) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", "shortstack", "run", str(recipe), "--out", str(out)]


def test_killed_it_goes_on(recipe: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of training: the same command resumes from the last saved step, to the same bytes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done(recipe, tmp_path / "whole")
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(recipe, out), env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    work = out / ".cpt.shortstack-work/checkpoints"
    deadline = time.monotonic() + 120
    while (
        not list(work.glob("checkpoint-[12]/complete.json")) and process.poll() is None and time.monotonic() < deadline
    ):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "cpt").exists()
    finished = subprocess.run(command(recipe, out), env=environment, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert "1/6 score: done by an earlier run" in finished.stderr
    assert "2/6 prune: done by an earlier run" in finished.stderr
    assert "resuming from step" in finished.stderr
    assert not list(out.glob(".*"))
    for name in ("scores.json", "model.safetensors"):
        step = "score" if name == "scores.json" else "cpt"
        one, other = ((folder / step / name).read_bytes() for folder in (tmp_path / "whole", out))
        if step == "cpt":
            assert one == other
        else:
            assert json.loads(one)["criteria"] == json.loads(other)["criteria"]
    figures = [
        json.loads((folder / "compare/comparison.json").read_text())["figures"] for folder in (tmp_path / "whole", out)
    ]
    assert figures[0] == figures[1]


def test_two_runs_do_not_share_a_folder(recipe: Path, tmp_path: Path) -> None:
    from shortstack.runtime.atomic_output import locked

    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"), pytest.raises(ShortstackError, match="another shortstack process is writing it"):
        done(recipe, tmp_path / "out")


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_several_processes_share_the_training_and_nothing_else(kind: str, recipe: Path, tmp_path: Path) -> None:
    """Two trainings one after the other, as CPT and then LoRA."""
    out = tmp_path / "out"
    small = "seq_len: 16, batch: 2, micro_batch: 1, max_steps: 1, validation: 2"
    more = f"  again: {{stage: retrain cpt, data: text.jsonl, {small}}}\n"
    recipe.write_text(recipe.read_text().replace("  ppl:", f"{more}  ppl:"))
    process = launched(kind, 2, ["run", str(recipe), "--out", str(out)], tmp_path)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
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
