"""What ends a run, and what is left then."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shortstack.errors import ShortstackError
from shortstack.retraining.losses import NextToken
from shortstack.retraining.teach import teach
from shortstack.retraining.trainer import RetrainTrainer
from tests import pico
from tests.retraining.test_resume import work_of

Retrained = Callable[..., Any]


@pytest.mark.fault(65)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(
    retrained: Retrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    real, calls = NextToken.__call__, [0]

    def poisoned(self: NextToken, model: Any, batch: Any) -> dict[str, torch.Tensor]:
        calls[0] += model.training
        sums = real(self, model, batch)
        return {"loss": sums["loss"] * value} if calls[0] == 2 * 5 and model.training else sums

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(NextToken, "__call__", poisoned)
        with pytest.raises(ShortstackError, match=r"the loss of step 5 is (nan|inf).*checkpoint of step 4 is kept"):
            retrained("cpt", out)
    assert not out.exists()
    retrained("cpt", out)
    assert (out / "model.safetensors").is_file()


@pytest.mark.fault(49, 93)
def test_a_full_disk_at_a_save_keeps_the_checkpoint_before(
    retrained: Retrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = RetrainTrainer._save

    def full(self: RetrainTrainer, output_dir: str | None = None, state_dict: Any = None) -> None:
        real(self, output_dir, state_dict)
        if self.state.global_step == 6:
            raise OSError(28, "No space left on device")

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(RetrainTrainer, "_save", full)
        with pytest.raises(ShortstackError, match="could not be saved.*the one of step 4 is kept"):
            retrained("cpt", out)
    assert sorted(path.name for path in (work_of(out) / "checkpoints").iterdir()) == ["checkpoint-2", "checkpoint-4"]
    retrained("cpt", out, quiet=False)
    assert "resuming from step 4" in capsys.readouterr().err


@pytest.mark.fault(39, 100)
@pytest.mark.parametrize("way", ["lora", "cpt", "eval data", "teach"])
def test_added_tokens_are_refused_before_the_first_step(
    way: str, retrained: Retrained, pruned: Path, text: Path, tmp_path: Path
) -> None:
    """The tokenizer was given tokens, the embedding no rows for them."""
    model = tmp_path / "model"
    shutil.copytree(pruned, model)
    tokenizer = pico.tokenizer()
    tokenizer.add_tokens(["<there is a row for this one>", "<mine>"])
    tokenizer.save_pretrained(model)
    row = {"text": "a <mine> " * 60} if way != "lora" else {"instruction": "a", "output": "<mine>"}
    data = tmp_path / "d.jsonl"
    data.write_text(json.dumps(row) + "\n")
    out = tmp_path / "out"
    runs: dict[str, Callable[[], Any]] = {
        "teach": lambda: teach(str(model), data=str(data), out=out, seq_len=32, validation=0, quiet=True),
        "eval data": lambda: retrained("cpt", out, model, data=str(text), eval_data=str(data)),
        "cpt": lambda: retrained("cpt", out, model, data=str(data)),
        "lora": lambda: retrained("lora", out, model, data=str(data)),
    }
    with pytest.raises(ShortstackError, match="token( id)? 260.* the embedding has 260 rows") as error:
        runs[way]()
    assert "d.jsonl, line 1" in error.value.message or way == "eval data"
    assert not out.exists()
