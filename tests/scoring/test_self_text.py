"""`self:PROMPTS`: text that the dense model writes itself, once for a seed; its continuations count."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shortstack.common.progress import Progress
from shortstack.data.calibration import CalibrationOptions, CalibrationSet
from shortstack.errors import ShortstackError, UsageError
from shortstack.evaluation import generate
from shortstack.families.open_model import open_checkpoint
from shortstack.scoring.score import calibration_windows, score
from tests import pico

Built = Callable[..., Path]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHORTSTACK_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    """Eight lines."""
    (tmp_path / "prompts.txt").write_text("".join(f"prompt number {n} says that\n\n" for n in range(8)))
    return f"self:{tmp_path / 'prompts.txt'}"


def drawn(model: Path, data: str, **options: Any) -> CalibrationSet:
    options = {"samples": 3, "seq_len": 32, **options}
    return calibration_windows(
        open_checkpoint(model), CalibrationOptions(data=data, **options), progress=Progress(quiet=True)
    )


def test_windows_are_prompts_and_their_continuations(built: Built, prompts: str) -> None:
    found = drawn(built("llama"), prompts)
    assert found.counted is not None
    assert [len(window) for window in found.windows] == [32] * 3
    lines = {f"prompt number {n} says that"[:15] for n in range(8)}  # half a window, after BOS
    for window, counted in zip(found.windows, found.counted, strict=True):
        first = counted.index(True)
        assert all(counted[first:])
        assert pico.tokenizer().decode(window[1:first]) in lines
    assert found.record["source"] == prompts
    assert found.record["counted"] == "responses"
    assert len(found.record["sha256"]) == 64
    assert "continuations that the model drew itself" in found.record["detail"]


def test_it_is_written_once_for_a_seed(built: Built, prompts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, other = drawn(built("llama"), prompts), drawn(built("llama"), prompts, seed=5)
    assert first.windows != other.windows
    written = []
    monkeypatch.setattr(generate, "continued", lambda *_, **__: written.append(1))
    again = drawn(built("llama"), prompts)
    assert not written
    assert (again.windows, again.counted, again.record) == (first.windows, first.counted, first.record)


def test_another_model_writes_another_text(built: Built, prompts: str) -> None:
    assert drawn(built("llama"), prompts).windows != drawn(built("llama", seed=3), prompts).windows


def test_prompts_of_instructions_are_their_questions(built: Built, tmp_path: Path) -> None:
    rows = [{"question": f"{n} + {n}?", "answer": "SECRET"} for n in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = drawn(built("llama", max_position_embeddings=512), f"self:{tmp_path / 'rows.jsonl'}", seq_len=440)
    for window in found.windows:
        text = pico.tokenizer().decode(window)
        assert "Instruction" in text
        assert "SECRET" not in text


def test_it_is_a_source_among_others(built: Built, prompts: str, tmp_path: Path) -> None:
    (tmp_path / "books.txt").write_text("the cat sat " * 200)
    found = score(str(built("llama")), data=f"books={tmp_path / 'books.txt'},own={prompts}", samples=3, seq_len=32)
    own = found.criterion("ppl").sources["own"]
    alone = score(str(built("llama")), data=prompts, samples=3, seq_len=32).criterion("ppl")
    assert own.scores == pytest.approx(alone.scores, rel=1e-5)
    assert found.calibration["sources"]["own"]["sha256"] != found.calibration["sources"]["books"]["sha256"]


def test_all_tokens_count_where_that_is_requested(built: Built, prompts: str) -> None:
    assert drawn(built("llama"), prompts, count_prompts=True).counted is None


def test_several_processes_take_what_is_kept(built: Built, prompts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ShortstackError, match="each process would generate its own") as error:
        drawn(built("llama"), prompts)
    assert "in one process first" in error.value.hint
    monkeypatch.delenv("WORLD_SIZE")
    first = drawn(built("llama"), prompts)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert drawn(built("llama"), prompts).windows == first.windows


@pytest.mark.parametrize(
    ("text", "name", "options", "says"),
    [
        (" \n", "p.txt", {}, "no usable text"),
        ('{"input_ids": [3, 4]}\n', "p.jsonl", {}, "rows of input_ids cannot be used as prompts"),
        ("words\n", "p.txt", {"seq_len": 99}, "windows of 99 tokens, but .* has 64 positions"),
        ("words\n", "p.txt", {"sampling": "joined"}, "--sampling joined"),
        ("words\n", "p.txt", {"chat_template": True}, "--chat-template"),
        ("words\n", "p.txt", {"samples": 30}, "30 windows of 32 tokens need 960 tokens"),
    ],
)
def test_what_cannot_be_prompts(
    built: Built, tmp_path: Path, text: str, name: str, options: dict[str, Any], says: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ShortstackError, match=says):
        drawn(built("llama"), f"self:{tmp_path / name}", **options)


def test_rounds_need_more_text(built: Built, prompts: str) -> None:
    with pytest.raises(UsageError, match="--until stable"):
        score(str(built("llama")), data=prompts, until="stable", remove=2, samples=3, seq_len=32)
