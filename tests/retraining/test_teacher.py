"""A teacher that is streamed: the logits of the whole one, in the memory of a few blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shortstack.engine.block_model import NotSeparableError, Skeleton
from shortstack.errors import ShortstackError
from shortstack.families.open_model import open_checkpoint
from shortstack.retraining import teach as teaching
from shortstack.retraining import teacher as teachers
from shortstack.retraining.teach import teach
from tests import pico
from tests.kills import hashes
from tests.live_memory import peak_after
from tests.retraining.conftest import LONG

Built = Callable[..., Path]
GIVEN: dict[str, Any] = {"top_k": 8, "seq_len": 32, "validation": 4, "quiet": True}


def shards(out: Path) -> dict[str, str]:
    return {name: value for name, value in hashes(out).items() if name.endswith(".npz")}


def without_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teachers, "available_bytes", lambda *_: 1000)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gemma3_text", "mixtral"])
@pytest.mark.parametrize("data", ["text", "rows"])
def test_it_says_to_the_bit_what_the_whole_one_says(
    family: str, data: str, built: Built, text: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows whose documents are kept apart, and rows of several lengths with padding; several shards."""
    monkeypatch.setattr(teaching, "_ROWS_PER_SHARD", 8)
    given = (
        {**GIVEN, "data": str(text), "tokens": "600"}
        if data == "text"
        else {**GIVEN, "data": str(rows), "seq_len": 400}
    )
    for memory in ("resident", "streamed"):
        teach(str(built(family, **LONG)), out=tmp_path / memory, memory=memory, **given)
    assert len(shards(tmp_path / "streamed")) >= 3
    assert shards(tmp_path / "resident") == shards(tmp_path / "streamed")


def test_cut_off_it_resumes_with_the_next_shard(
    dense: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the first part was of a whole teacher."""
    monkeypatch.setattr(teaching, "_ROWS_PER_SHARD", 8)
    given = {**GIVEN, "data": str(text), "tokens": "1K", "quiet": False}
    teach(str(dense), out=tmp_path / "whole", **given)
    real, calls = teaching._TeacherRun._save, [0]

    def cut_off(self: Any, *arguments: Any) -> None:
        real(self, *arguments)
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(teaching._TeacherRun, "_save", cut_off)
        with pytest.raises(KeyboardInterrupt):
            teach(str(dense), out=tmp_path / "out", **given)
    teach(str(dense), out=tmp_path / "out", memory="streamed", **given)
    assert "resuming after 2 shards" in capsys.readouterr().err
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")


def test_it_is_streamed_where_the_whole_one_does_not_fit(
    dense: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the whole teacher was loaded")

    given = {**GIVEN, "data": str(text), "tokens": "200", "quiet": False}
    teach(str(dense), out=tmp_path / "whole", **given)
    assert "one at a time" not in capsys.readouterr().err
    monkeypatch.setattr(teachers, "load_model", never)
    without_room(monkeypatch)
    teach(str(dense), out=tmp_path / "out", **given)
    assert "of weights, 1 kB free: blocks are read one at a time" in capsys.readouterr().err
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")


def test_blocks_that_do_not_come_apart(
    dense: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A whole teacher, with a line; refused where streaming was requested."""

    def apart(*_: Any, **__: Any) -> None:
        raise NotSeparableError("model", "its blocks receive inputs that depend on the text")

    monkeypatch.setattr(Skeleton, "calls", apart)
    without_room(monkeypatch)
    given = {**GIVEN, "data": str(text), "tokens": "200", "quiet": False}
    teach(str(dense), out=tmp_path / "out", **given)
    assert (
        "the whole teacher is held in memory: its blocks receive inputs that depend on the text"
        in capsys.readouterr().err
    )
    with pytest.raises(ShortstackError, match="--memory streamed, but its blocks receive inputs that depend") as error:
        teach(str(dense), out=tmp_path / "again", memory="streamed", **given)
    assert "leave --memory out" in error.value.hint


@pytest.mark.parametrize(("hidden_weight", "hint"), [(0.0, "shortstack teach {dense} --data"), (1.0, "retrain local")])
def test_a_teacher_that_does_not_fit_beside_the_student(
    dense: Path,
    retrained: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    hidden_weight: float,
    hint: str,
) -> None:
    """Its logits are to be cached; cached logits hold no hidden states."""
    monkeypatch.setattr("shortstack.runtime.memory.available_bytes", lambda *_: 1000)
    monkeypatch.setattr("shortstack.engine.load.available_bytes", lambda *_: 10**12)
    with pytest.raises(ShortstackError, match="beside the student, 1 kB free on cpu") as error:
        retrained("distill", tmp_path / "out", teacher=str(dense), hidden_weight=hidden_weight)
    assert hint.format(dense=dense) in error.value.hint
    assert not (tmp_path / "out").exists()


def test_memory_is_that_of_a_few_blocks_whatever_the_depth(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights outside the blocks, three blocks, and the hidden states of a shard: counted at every block of every batch."""
    monkeypatch.setattr(teaching, "_ROWS_PER_SHARD", 8)
    wide = {"hidden_size": 128, "intermediate_size": 512, "head_dim": 32, **LONG}
    peaks: dict[int, int] = {}
    for depth in (6, 14):
        dense = tmp_path / f"dense-{depth}"
        pico.build(dense, num_hidden_layers=depth, **wide)
        with peak_after((Skeleton, "run_block"), (Skeleton, "logits")) as peak:
            teach(str(dense), data=str(text), out=tmp_path / f"out-{depth}", memory="streamed", tokens="400", **GIVEN)
        peaks[depth] = peak[0]
    checkpoint = open_checkpoint(tmp_path / "dense-14")
    block, outside = 4 * max(checkpoint.block_parameters()), 4 * checkpoint.parameters(checkpoint.outside_blocks)
    states = 4 * 8 * 32 * 128
    batch = 4 * 4 * 32 * (8 * 128 + 2 * 260)  # a micro-batch in a block, its arguments, and its logits, generously
    assert peaks[14] <= peaks[6] + block // 2
    assert peaks[14] <= outside + 3 * block + states + batch
    assert peaks[14] < 4 * checkpoint.parameters()
