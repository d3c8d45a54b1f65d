"""Runs: every step once, what resumes after a kill, and what is refused before anything runs."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import shortstack
from shortstack.cli.app import run as cli
from shortstack.errors import ShortstackError
from tests.kills import Warm
from tests.pruning.test_prune import counted_cuts
from tests.recipes.runs import STEPS, done, states

Built = Callable[..., Path]


def test_a_step_works_its_cut_out_once(built: Built, tmp_path: Path) -> None:
    """Though the step plans, writes and verifies."""
    path = tmp_path / "mine.yaml"
    path.write_text(f'about: a cut\nmodel: {built("llama")}\nsteps:\n  prune: {{blocks: "1,4", verify: true}}\n')
    with counted_cuts() as worked_out:
        done(path, tmp_path / "out")
    assert worked_out == ["shortened_config", "shortened_tensors"]


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


def test_every_result_is_printed_once(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only = ["--set", "cpt=null", "--set", "check=null"]
    command = ["run", str(recipe), "--out", str(tmp_path / "out"), *only]
    assert cli(command) == 0
    shown = capsys.readouterr()
    whole = shown.out + shown.err
    for found in ("logits equal bit for bit", "ppl_16 over", "differences are relative to"):
        assert whole.count(found) == 1, found
    assert "differences are relative to" in shown.out
    assert cli(command) == 0
    assert capsys.readouterr().out.count("differences are relative to") == 1


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


def test_killed_it_goes_on(recipe: Path, warm: Warm, tmp_path: Path) -> None:
    """SIGKILL in the middle of training: the same command resumes from the last saved step, to the same bytes."""
    done(recipe, tmp_path / "whole")
    out, log = tmp_path / "out", tmp_path / "log.txt"
    command = ["run", str(recipe), "--out", str(out)]
    sign = out / ".cpt.shortstack-work/checkpoints/checkpoint-1/complete.json"
    assert warm.run(command, log, sign=sign)["code"] == -signal.SIGKILL, log.read_text()
    assert not (out / "cpt").exists()
    assert warm.run(command, log)["code"] == 0, log.read_text()
    said = log.read_text()
    assert "1/6 score: done by an earlier run" in said
    assert "2/6 prune: done by an earlier run" in said
    assert "resuming from step" in said
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
