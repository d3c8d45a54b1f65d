"""A run that was cut off resumes from its saved state, and gives the same scores bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shortstack.artifacts.scores import Scores
from shortstack.common.progress import Progress
from shortstack.data.calibration import CalibrationSet
from shortstack.engine.journal import Journal, read_state
from shortstack.families.open_model import open_checkpoint
from shortstack.scoring.criteria import parse_criteria
from shortstack.scoring.score import score, score_windows
from tests import pico

Built = Callable[..., Path]
CRITERIA = "ppl,taylor,magnitude,taylor:batch=2"


class CutOffError(Exception):
    pass


def scored(model: Path, folder: Path | None, **options: Any) -> Scores:
    return score_windows(
        open_checkpoint(model), CalibrationSet(pico.windows(), {}), parse_criteria(CRITERIA),
        work_folder=folder, save_every=0.0, **options,
    )  # fmt: skip


def figures(found: Scores) -> dict[str, Any]:
    return {name: {**criterion.__dict__} for name, criterion in found.criteria.items()}


def cut_off_after(monkeypatch: pytest.MonkeyPatch, saves: int) -> None:
    """As if the process died right after this many states were saved."""
    real, done = Journal.save, [0]

    def save(self: Journal, *arguments: Any) -> None:
        real(self, *arguments)
        done[0] += 1
        if done[0] == saves:
            raise CutOffError

    monkeypatch.setattr(Journal, "save", save)


@pytest.mark.fault(52)
@pytest.mark.parametrize("streams", [None, 3])
@pytest.mark.parametrize("saves", [1, 3, 6, 7, 8, 10, 13, 15, 18, 19])
def test_goes_on_bit_for_bit(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saves: int, streams: int | None
) -> None:
    """Cut off in the forward sweep, at the end of a group, in each of two backward sweeps."""
    options: dict[str, Any] = {"memory": "streamed"}
    if streams is not None:
        options["stream_bytes"] = streams * 4 * 16 * 32 * 4
    expected = figures(scored(built("llama"), None, **options))
    with monkeypatch.context() as patched:
        cut_off_after(patched, saves)
        with pytest.raises(CutOffError):
            scored(built("llama"), tmp_path / "work", **options)
    left = read_state(tmp_path / "work")
    assert left is not None
    options.pop("stream_bytes", None)  # what the first run decided about groups is kept
    assert figures(scored(built("llama"), tmp_path / "work", **options)) == expected


def test_only_what_is_left_is_computed(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shortstack.engine.block_model import Skeleton

    with monkeypatch.context() as patched:
        cut_off_after(patched, 4)
        with pytest.raises(CutOffError):
            scored(built("llama"), tmp_path / "work")
    calls: list[int] = []
    real = Skeleton.run_block

    def run_block(self: Any, block: Any, *arguments: Any) -> Any:
        calls.append(self.blocks.index(block))
        return real(self, block, *arguments)

    monkeypatch.setattr(Skeleton, "run_block", run_block)
    scored(built("llama"), tmp_path / "work")
    assert calls[0] == 4


@pytest.mark.parametrize("saves", [1, 3])
def test_models_that_are_held_whole(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saves: int
) -> None:
    from tests.families import tiny

    def run(folder: Path | None) -> Scores:
        return score_windows(
            tiny.open_checkpoint(tiny_model("zamba")), CalibrationSet(tiny.WINDOWS.tolist(), {}),
            parse_criteria("ppl,magnitude"), work_folder=folder, save_every=0.0,
        )  # fmt: skip

    expected = figures(run(None))
    with monkeypatch.context() as patched:
        cut_off_after(patched, saves)
        with pytest.raises(CutOffError):
            run(tmp_path / "work")
    assert figures(run(tmp_path / "work")) == expected


@pytest.mark.parametrize("change", ["windows", "criteria", "model", "dtype"])
def test_the_state_of_another_run_is_not_used(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reused only when all that makes the figures agrees; and it is said."""
    with monkeypatch.context() as patched:
        cut_off_after(patched, 3)
        with pytest.raises(CutOffError):
            scored(built("llama"), tmp_path / "work")
    model = built("llama", seed=1) if change == "model" else built("llama")
    windows = pico.windows(seed=8) if change == "windows" else pico.windows()
    criteria = "ppl" if change == "criteria" else CRITERIA
    options: dict[str, Any] = {"dtype": "float64"} if change == "dtype" else {}

    def run(folder: Path | None) -> Scores:
        return score_windows(
            open_checkpoint(model), CalibrationSet(windows, {}), parse_criteria(criteria), work_folder=folder,
            progress=Progress(), **options,
        )  # fmt: skip

    found = figures(run(tmp_path / "work"))
    assert "belongs to another run" in capsys.readouterr().err
    assert found == figures(run(None))


@pytest.mark.fault(53)
@pytest.mark.parametrize("damage", ["half", "empty", "garbage"])
def test_a_state_that_cannot_be_read_is_as_good_as_none_and_reported(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        cut_off_after(patched, 3)
        with pytest.raises(CutOffError):
            scored(built("llama"), tmp_path / "work")
    path = tmp_path / "work/state.safetensors"
    data = path.read_bytes()
    path.write_bytes({"half": data[: len(data) // 2], "empty": b"", "garbage": b"x" * 100}[damage])
    found = figures(scored(built("llama"), tmp_path / "work", progress=Progress()))
    assert capsys.readouterr().err.count("cannot be read and is not used") == 1
    assert found == figures(scored(built("llama"), None))


@pytest.mark.fault(53)
def test_a_state_is_replaced_whole(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off while a state is being written: the one before it is there, and is used."""
    from shortstack.runtime import atomic_output as writer

    expected = figures(scored(built("llama"), None))
    count = [0]
    real = writer.os.fsync

    def fsync(descriptor: int) -> None:
        count[0] += 1
        if count[0] == 4:
            raise CutOffError
        real(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(writer.os, "fsync", fsync)
        with pytest.raises(CutOffError):
            scored(built("llama"), tmp_path / "work")
    assert read_state(tmp_path / "work") is not None
    assert figures(scored(built("llama"), tmp_path / "work")) == expected


def test_the_stage_leaves_nothing_but_the_scores(built: Built, tmp_path: Path) -> None:
    windows = tmp_path / "w.jsonl"
    windows.write_text("".join(json.dumps({"input_ids": window}) + "\n" for window in pico.windows()))
    out = tmp_path / "s.json"
    score(str(built("llama")), data=str(windows), samples=4, out=out, save_every=0.0, quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.json", "w.jsonl"]


def test_without_an_output_nothing_is_saved(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    score(str(built("llama")), criterion="magnitude", quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_yet_is_made(built: Built, tmp_path: Path) -> None:
    score(str(built("llama")), criterion="magnitude", out=tmp_path / "a/b/s.json", quiet=True)
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["s.json"]
