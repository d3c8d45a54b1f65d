"""Named sources: read from one option, drawn each as it would be alone, joined as one set of windows."""

from __future__ import annotations

from pathlib import Path

import pytest

from shortstack.data.calibration import CalibrationOptions, CalibrationSet, draw_windows
from shortstack.data.named_sources import joined_sets, named_sources, preview_calibration
from shortstack.data.sources import read_corpus
from shortstack.errors import ShortstackError, UsageError
from tests import pico


@pytest.mark.parametrize(
    ("data", "found"),
    [
        ("embedded", {}),
        ("a/b=c.txt", {}),
        ("general=books.txt", {"general": "books.txt"}),
        ("general=books.txt, code=src=old.jsonl", {"general": "books.txt", "code": "src=old.jsonl"}),
    ],
)
def test_what_is_named(data: str, found: dict[str, str]) -> None:
    assert named_sources(data) == found


def test_a_file_of_that_very_name_is_one_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert named_sources("year=2020.txt") == {"year": "2020.txt"}
    Path("year=2020.txt").write_text("text")
    assert named_sources("year=2020.txt") == {}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("a=x.txt,a=y.txt", "two sources have the name a"),
        ("a=x.txt,y.txt", "'y.txt' has no name"),
        ("a=x.txt,b=", "b has no source"),
    ],
)
def test_names_that_cannot_be_used(data: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as error:
        named_sources(data)
    assert error.value.hint


def test_a_source_without_text(tmp_path: Path) -> None:
    (tmp_path / "full.txt").write_text("words " * 500)
    (tmp_path / "blank.txt").write_text(" \n")
    data = f"full={tmp_path / 'full.txt'},blank={tmp_path / 'blank.txt'}"
    with pytest.raises(ShortstackError, match=r"blank\.txt: no usable text"):
        preview_calibration(CalibrationOptions(data=data, seq_len=16))


def drawn(file: Path) -> CalibrationSet:
    corpus = read_corpus(str(file), role="calibration")
    return draw_windows(corpus, pico.tokenizer(), samples=4, seq_len=16)


def test_joined_sets_know_their_sources(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 200)
    sets = {name: drawn(tmp_path / f"{name}.txt") for name in ("one", "two")}
    joined = joined_sets(CalibrationOptions(data="one=one.txt,two=two.txt"), sets)
    assert joined.windows == [*sets["one"].windows, *sets["two"].windows]
    assert joined.places == {"one": [0, 1, 2, 3], "two": [4, 5, 6, 7]}
    assert joined.record["samples"] == 4
    assert joined.record["source"] == "one=one.txt,two=two.txt"
    assert joined.record["sources"]["two"]["sha256"] == sets["two"].record["sha256"]
    first, second = joined.halves()
    assert first.sources == ("one", "two", "one", "two")  # the first few have all sources
    assert first.windows == [joined.windows[place] for place in (0, 4, 1, 5)]
    assert second.windows == [joined.windows[place] for place in (2, 6, 3, 7)]
    assert first.record["samples"] == 2


def test_windows_of_several_lengths_are_refused() -> None:
    sets = {"one": CalibrationSet(pico.windows(2, 8), {"sha256": "", "seq_len": 8}),
            "two": CalibrationSet(pico.windows(2, 9), {"sha256": "", "seq_len": 9})}  # fmt: skip
    with pytest.raises(ShortstackError, match="must be of one length, found 8 of one, 9 of two tokens"):
        joined_sets(CalibrationOptions(data="one=a,two=b"), sets)
