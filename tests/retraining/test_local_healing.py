"""The steps of one block: a loss that is not finite, states that are saved and lost, and a block that became worse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shortstack.errors import ShortstackError
from shortstack.retraining.local_healing import Healing
from shortstack.retraining.run_folder import Session
from tests.kills import hashes
from tests.retraining.test_resume import CutOffError, cut_off_at, work_of
from tests.retraining.whole_states import metrics

Retrained = Callable[..., Any]


@pytest.mark.fault(65)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(
    value: float, retrained: Retrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls, out = Healing._losses, [0], tmp_path / "out"

    def poisoned(self: Healing, number: int) -> dict[str, torch.Tensor]:
        calls[0] += torch.is_grad_enabled()
        found = real(self, number)
        return {**found, "loss": found["loss"] * value} if calls[0] == 2 * 6 and torch.is_grad_enabled() else found

    with monkeypatch.context() as patch:
        patch.setattr(Healing, "_losses", poisoned)
        with pytest.raises(ShortstackError, match=r"the loss of step 6 is (nan|inf).*checkpoint of step 4 is kept"):
            retrained("local", out)
    assert not out.exists()
    retrained("local", out)
    retrained("local", tmp_path / "whole")
    assert hashes(out)["model.safetensors"] == hashes(tmp_path / "whole")["model.safetensors"]


@pytest.mark.fault(49, 93)
def test_a_full_disk_at_a_save_keeps_the_checkpoint_before(
    retrained: Retrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Session.complete

    def full(self: Session, checkpoint: Path) -> None:
        if checkpoint.name == "checkpoint-6":
            raise OSError(28, "No space left on device")
        real(self, checkpoint)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "complete", full)
        with pytest.raises(ShortstackError, match="could not be saved.*the one of step 4 is kept"):
            retrained("local", tmp_path / "out")
    assert sorted(path.name for path in (work_of(tmp_path / "out") / "checkpoints").iterdir()) == [
        "checkpoint-2", "checkpoint-4",
    ]  # fmt: skip


@pytest.fixture
def cut_off(retrained: Retrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that ended in the middle of its second block."""
    with monkeypatch.context() as patch:
        cut_off_at(patch, 6)
        with pytest.raises(CutOffError):
            retrained("local", tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.fault(68)
def test_a_state_without_its_optimizer_is_refused(cut_off: Path, retrained: Retrained) -> None:
    (work_of(cut_off) / "checkpoints/checkpoint-6/optimizer.safetensors").unlink()
    with pytest.raises(ShortstackError, match=r"optimizer\.safetensors") as error:
        retrained("local", cut_off)
    assert "--weights-only-resume" in error.value.hint
    retrained("local", cut_off, weights_only_resume=True)
    assert (cut_off / "model.safetensors").is_file()


@pytest.mark.fault(68)
def test_a_finished_block_that_is_lost_is_an_error(cut_off: Path, retrained: Retrained) -> None:
    (file,) = (work_of(cut_off) / "blocks").iterdir()
    whole = file.read_bytes()
    for broken in (whole[: len(whole) // 2], None):
        file.unlink(missing_ok=True)
        if broken is not None:
            file.write_bytes(broken)
        with pytest.raises(ShortstackError, match="a block that was trained before cannot be read") as error:
            retrained("local", cut_off)
        assert "--restart" in error.value.hint
    retrained("local", cut_off, restart=True)


@pytest.mark.fault(69)
def test_another_run_is_refused_with_what_differs(cut_off: Path, retrained: Retrained) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"radius": 2}, "hyperparameters.local.radius was 1, now 2"),
        ({"lora_rank": 2}, "hyperparameters.local.lora_rank"),
        ({"tokens": "1K"}, "steps was 8, now 16"),
        ({"seed": 1}, "seed was 42, now 1"),
    ]
    for changed, difference in cases:
        with pytest.raises(ShortstackError, match=difference):
            retrained("local", cut_off, **changed)
    # Resumed all the same: what was saved is of another block.
    with pytest.raises(ShortstackError, match="is of step 2 of block 4, and the run is at step 6 of block 1") as error:
        retrained("local", cut_off, tokens="1K", force=True)
    assert "--restart" in error.value.hint


def test_a_block_that_training_makes_worse_is_left_as_it_was(
    retrained: Retrained, pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    retrained("local", tmp_path / "out", lr=0.9, quiet=False)
    assert "training did not bring it nearer to the dense model" in capsys.readouterr().err
    left = {
        line["block"]
        for line in metrics(tmp_path / "out")
        if line.get("validation", 0) > line.get("validation_before", 0)
    }
    assert left
    before, after = (load_file(folder / "model.safetensors") for folder in (pruned, tmp_path / "out"))
    changed = {(1, 4)[int(name.split(".")[2]) - 1] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {1, 4} - left
