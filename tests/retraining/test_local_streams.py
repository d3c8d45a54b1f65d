"""Hidden states on their way through two models: in memory or on the disk, finite, and block by block."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shortstack.engine.block_model import NotSeparableError, Skeleton
from shortstack.errors import ShortstackError
from shortstack.pruning.prune import prune
from shortstack.retraining.batch_states import BatchStates
from tests.kills import hashes
from tests.retraining.conftest import LONG
from tests.retraining.test_resume import work_of

Retrained = Callable[..., Any]
Built = Callable[..., Path]


def test_on_disk_as_in_memory(retrained: Retrained, tmp_path: Path) -> None:
    for states in ("memory", "disk"):
        retrained("local", tmp_path / states, states=states, update_weight=0.5, cosine_weight=0.1, epochs=2)
    assert hashes(tmp_path / "memory")["model.safetensors"] == hashes(tmp_path / "disk")["model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")) == ["disk", "memory"]


def test_states_that_would_fill_the_memory_lie_on_disk(
    retrained: Retrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files: list[Path | None] = []
    real = BatchStates.__init__

    def made(self: BatchStates, shapes: Any, width: int, dtype: torch.dtype, file: Path | None) -> None:
        files.append(file)
        real(self, shapes, width, dtype, file)

    monkeypatch.setattr(BatchStates, "__init__", made)
    monkeypatch.setattr("shortstack.retraining.local_streams.available_bytes", lambda *_: 200_000)
    retrained("local", tmp_path / "out", quiet=False)
    assert "are kept on disk, beside" in capsys.readouterr().err
    assert None not in files
    monkeypatch.setattr("shortstack.retraining.local_streams.available_bytes", lambda *_: 1_000)
    with pytest.raises(ShortstackError, match="are free in memory") as error:
        retrained("local", tmp_path / "again", states="memory")
    assert "--states disk" in error.value.hint


def test_dense_states_that_are_not_finite_are_an_error(built: Built, retrained: Retrained, tmp_path: Path) -> None:
    dense, model = tmp_path / "dense", tmp_path / "model"
    shutil.copytree(built("llama", **LONG), dense)
    weights = load_file(dense / "model.safetensors")
    weights["model.layers.4.mlp.down_proj.weight"] *= 1e38
    save_file(weights, dense / "model.safetensors", {"format": "pt"})
    prune(str(dense), blocks="2,3", out=model, quiet=True)
    with pytest.raises(ShortstackError, match="block 4 gives hidden states that are not finite"):
        retrained("local", tmp_path / "out", model=model, of=str(dense))
    assert not (tmp_path / "out").exists()


@pytest.mark.fault(49)
def test_a_disk_that_fills_while_states_lie_on_it(
    retrained: Retrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beforehand where it is known, else at the write; the blocks that are done stay."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("shortstack.retraining.local_streams._free_disk", lambda _: 1000)
        with pytest.raises(ShortstackError, match="hidden states take .* 1 kB are free on the disk"):
            retrained("local", out, states="disk")
    real = BatchStates.__setitem__

    def full(self: BatchStates, number: int, states_BTD: torch.Tensor) -> None:
        if any(work_of(out).glob("blocks/*")):
            raise self._unwritable(OSError(28, "No space left on device"))
        real(self, number, states_BTD)

    with monkeypatch.context() as patch:
        patch.setattr(BatchStates, "__setitem__", full)
        with pytest.raises(ShortstackError, match="hidden states could not be written"):
            retrained("local", out, states="disk")
    assert not out.exists()
    assert not (work_of(out) / "states").exists()
    retrained("local", out, states="disk", quiet=False)
    assert "resuming from step 4" in capsys.readouterr().err


def test_a_model_whose_blocks_do_not_come_apart_is_refused(
    retrained: Retrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def apart(*_: Any, **__: Any) -> None:
        raise NotSeparableError("model", "its blocks receive inputs that depend on the text")

    monkeypatch.setattr(Skeleton, "__init__", apart)
    with pytest.raises(
        ShortstackError, match="its blocks cannot be trained one at a time: its blocks receive inputs"
    ) as error:
        retrained("local", tmp_path / "out")
    assert "retrain distill --hidden-weight 1" in error.value.hint
