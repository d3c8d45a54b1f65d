"""A run that was cut off resumes from its last complete checkpoint, bit for bit, or says why it does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shortstack.errors import ShortstackError
from shortstack.retraining.run_folder import COMPLETE, Session
from tests.kills import hashes
from tests.retraining import material

Retrained = Callable[..., Any]
WAYS = ("lora", "cpt", "distill", "offline", "local")


class CutOffError(Exception):
    pass


def work_of(out: Path) -> Path:
    return out.parent / f".{out.name}.shortstack-work"


def cut_off_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """As if the process died right after the checkpoint of this step was complete."""
    real = Session.complete

    def complete(self: Session, checkpoint: Path) -> None:
        real(self, checkpoint)
        if checkpoint.name == f"checkpoint-{step}":
            raise CutOffError

    monkeypatch.setattr(Session, "complete", complete)


@pytest.fixture(scope="module")
def whole(retrained: Retrained, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Each way's run without an interruption."""
    known: dict[str, Path] = {}

    def get(way: str) -> Path:
        if way not in known:
            known[way] = tmp_path_factory.mktemp(way) / "whole"
            retrained(way, known[way])
        return known[way]

    return get


def figures(out: Path) -> list[dict[str, Any]]:
    """What was logged, but for times."""
    timed = ("tokens_per_second", "seconds_left", "share_of_peak")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in timed} for line in lines]


# 24 rows, 22 of them to train on, 4 a step: an epoch ends within step 6, so that steps 2, 4 and 6 are its middle and end.
@pytest.mark.fault(70)
@pytest.mark.parametrize("step", [2, 4, 6])
@pytest.mark.parametrize("way", WAYS)
def test_goes_on_bit_for_bit(
    way: str, step: int, retrained: Retrained, whole: Callable[[str], Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    expected = hashes(whole(way))
    with monkeypatch.context() as patch:
        cut_off_at(patch, step)
        with pytest.raises(CutOffError):
            retrained(way, out)
    assert not out.exists()
    assert (work_of(out) / f"checkpoints/checkpoint-{step}" / COMPLETE).is_file()
    retrained(way, out, quiet=False)
    assert f"resuming from step {step}" in capsys.readouterr().err
    assert hashes(out)["model.safetensors"] == expected["model.safetensors"]
    assert figures(out) == figures(whole(way))
    if way == "lora":
        assert hashes(out)["adapter/adapter_model.safetensors"] == expected["adapter/adapter_model.safetensors"]
    assert not work_of(out).exists()


@pytest.mark.fault(70)
def test_with_workers_too(
    retrained: Retrained, whole: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What workers have prepared ahead is not in the checkpoint."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        cut_off_at(patch, 4)
        with pytest.raises(CutOffError):
            retrained("cpt", out, workers=2)
    retrained("cpt", out, workers=2)
    assert figures(out) == figures(whole("cpt"))
    assert hashes(out)["model.safetensors"] == hashes(whole("cpt"))["model.safetensors"]


@pytest.fixture
def cut_off(retrained: Retrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that ended after step 4, with checkpoints at 2 and 4."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        cut_off_at(patch, 4)
        with pytest.raises(CutOffError):
            retrained("cpt", out)
    return out


@pytest.mark.fault(67)
def test_a_partial_checkpoint_is_never_used(
    cut_off: Path, retrained: Retrained, whole: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    partial = work_of(cut_off) / "checkpoints/checkpoint-6"
    shutil.copytree(work_of(cut_off) / "checkpoints/checkpoint-4", partial)
    (partial / COMPLETE).unlink()
    (partial / "optimizer.pt").write_bytes(b"half")
    retrained("cpt", cut_off, quiet=False)
    assert "resuming from step 4" in capsys.readouterr().err
    assert hashes(cut_off)["model.safetensors"] == hashes(whole("cpt"))["model.safetensors"]


@pytest.mark.fault(68)
@pytest.mark.parametrize("lost", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_without_its_state_is_refused(cut_off: Path, lost: str, retrained: Retrained) -> None:
    (work_of(cut_off) / "checkpoints/checkpoint-4" / lost).unlink()
    with pytest.raises(ShortstackError, match=lost) as error:
        retrained("cpt", cut_off)
    assert "--weights-only-resume" in error.value.hint
    retrained("cpt", cut_off, weights_only_resume=True)
    assert (cut_off / "model.safetensors").is_file()


@pytest.mark.fault(68)
def test_a_checkpoint_without_its_weights_cannot_go_on(cut_off: Path, retrained: Retrained) -> None:
    (work_of(cut_off) / "checkpoints/checkpoint-4/trained.safetensors").unlink()
    with pytest.raises(ShortstackError, match=r"trained\.safetensors"):
        retrained("cpt", cut_off, weights_only_resume=True)


@pytest.mark.fault(69)
def test_another_run_is_refused_with_what_differs(
    cut_off: Path, retrained: Retrained, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = material.texts(tmp_path / "other.jsonl", seed=1)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"data": str(other)}, "data was"),
        ({"lr": 2e-2}, "hyperparameters.learning_rate was 0.01, now 0.02"),
        ({"model": dense}, "model was"),
        ({"seed": 1}, "seed was 42, now 1"),
        ({"max_steps": 9}, "steps was 8, now 9"),
    ]
    for changed, difference in cases:
        with pytest.raises(ShortstackError, match=difference):
            retrained("cpt", cut_off, **changed)
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ShortstackError, match="world size was 1, now 2"):
            retrained("cpt", cut_off)
    assert not cut_off.exists()
    retrained("cpt", cut_off, lr=2e-2, force=True)
    step = json.loads((cut_off / "shortstack.json").read_text())["steps"][-1]
    assert step["forced"] == ["hyperparameters.learning_rate was 0.01, now 0.02"]


@pytest.mark.fault(69)
def test_rows_that_become_other_text_are_another_run(
    retrained: Retrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same file of a template is another one once its text has changed."""
    own = tmp_path / "own.json"
    own.write_text('{"prompt_input": "{instruction} {input}: ", "prompt_no_input": "{instruction}: "}')
    out, asked = tmp_path / "out", {"prompt_template": str(own), "target_modules": "q_proj,v_proj"}
    with monkeypatch.context() as patch:
        cut_off_at(patch, 2)
        with pytest.raises(CutOffError):
            retrained("lora", out, **asked)
    with pytest.raises(ShortstackError, match=r"hyperparameters.prompt.train_on_inputs was False, now True"):
        retrained("lora", out, **asked, train_on_inputs=True)
    with pytest.raises(ShortstackError, match=r"hyperparameters.lora.target_modules was q_proj,v_proj, now q_proj"):
        retrained("lora", out, **{**asked, "target_modules": "q_proj"})
    text = own.read_text()
    own.write_text(text.replace("}: ", "}? "))
    with pytest.raises(ShortstackError, match=r"hyperparameters.prompt.template"):
        retrained("lora", out, **asked)
    own.write_text(text)
    retrained("lora", out, **asked)
    chosen = json.loads((out / "adapter/adapter_config.json").read_text())["target_modules"]
    assert sorted(chosen) == ["q_proj", "v_proj"]
    record = json.loads((out / "shortstack.json").read_text())["steps"][-1]["hyperparameters"]
    assert record["prompt"]["template"]["without_input"] == "{instruction}: "
    assert record["lora"]["target_modules"] == "q_proj,v_proj"


def test_an_interrupt_says_what_comes_next(
    retrained: Retrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Session.complete

    def complete(self: Session, checkpoint: Path) -> None:
        real(self, checkpoint)
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "complete", complete)
    with pytest.raises(KeyboardInterrupt):
        retrained("cpt", tmp_path / "out", quiet=False)
    assert "the same command resumes from step 2\n" in capsys.readouterr().err


def test_restart_begins_anew(
    cut_off: Path, retrained: Retrained, whole: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    retrained("cpt", cut_off, restart=True, quiet=False)
    assert "resuming" not in capsys.readouterr().err
    assert figures(cut_off) == figures(whole("cpt"))
