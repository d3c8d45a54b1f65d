"""Compressed files: entered at any byte of their text; broken ones, and others under such a name, are one error each."""

from __future__ import annotations

import bz2
import functools
import gzip
import io
import itertools
import json
import lzma
import random
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from shortstack.data import decompressed
from shortstack.data.decompressed import Decompressed, Entries
from shortstack.data.files import open_rows
from shortstack.data.instructions import kind_of
from shortstack.data.sources import file_rows, read_corpus
from shortstack.data.text_stream import open_texts
from shortstack.errors import ShortstackError
from shortstack.evaluation.prompts import _prompts_of

pytestmark = pytest.mark.fault(115)

_WORDS = random.Random(5)
ROWS = [{"text": f"row {number} " + "".join(_WORDS.choice("abcdefgh ") for _ in range(300))} for number in range(2_000)]
TEXT = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
PACK: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstandard.compress}
packed = functools.cache(lambda suffix: PACK[suffix](TEXT))


def zipped(data: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("x.jsonl", data)
    return stream.getvalue()


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(byte ^ 0xFF for byte in data[middle : middle + 64]) + data[middle + 64 :]


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut off": (lambda data: data[: len(data) // 2], "ends in the middle of its compressed data"),
    "cut off in its check": (lambda data: data[:-3], "ends in the middle of its compressed data"),
    "broken inside": (flipped, r"not (gzip|zstd), or broken|ends in the middle|line \d+: not"),
    "with something behind": (lambda data: data + b"and more", "not (gzip|zstd), or broken"),
    "xz": (lambda _: lzma.compress(TEXT), "is xz, not"),
    "bzip2": (lambda _: bz2.compress(TEXT), "is bzip2, not"),
    "zip": (lambda _: zipped(TEXT), "is zip, not"),
    "plain": (lambda _: TEXT, "is plain JSON, not"),
    "a pointer": (lambda _: b"version https://git-lfs.github.com/spec/v1\n", "is a Git-LFS pointer, not"),
    "a page": (lambda _: b"<!DOCTYPE html>", "is HTML or XML, not"),
    "something": (lambda _: b"something else", "not (gzip|zstd), or broken"),
}
damaged = functools.cache(lambda damage, suffix: DAMAGE[damage][0](packed(suffix)))
READERS: dict[str, Callable[[Path], Any]] = {
    "all": lambda file: read_corpus(str(file), role="training"),
    "counted": lambda file: read_corpus(str(file), role="calibration", counted_beyond=0),
    "rows": lambda file: list(file_rows(file)),
    "stream": lambda file: list(open_texts(str(file)).pieces(1_000)),
    "prompts": lambda file: _prompts_of(file),
    "instructions": lambda file: kind_of(str(file)),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["x.json.gz", "x.jsonl.gz", "x.jsonl.zst"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named(tmp_path: Path, damage: str, name: str, reader: str) -> None:
    file = tmp_path / name
    file.write_bytes(damaged(damage, file.suffix))
    if reader == "instructions" and damage in (
        "cut off",
        "cut off in its check",
        "broken inside",
        "with something behind",
    ):
        return  # it looks at the first row alone
    with pytest.raises(ShortstackError, match=DAMAGE[damage][1]) as refused:
        READERS[reader](file)
    assert str(refused.value).startswith(str(file))
    assert refused.value.hint


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress, lzma.compress], ids=["gzip", "zstd", "xz"])
def test_what_is_compressed_under_a_plain_name_is_named(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(pack(TEXT))
    with pytest.raises(ShortstackError, match=r"x.jsonl: is (gzip|zstd|xz), not text") as refused:
        read_corpus(str(file), role="training")
    assert "rename it to end in" in refused.value.hint or "unpack it" in refused.value.hint


def members(text: bytes, suffix: str, cuts: list[int]) -> bytes:
    edges = [0, *sorted(cuts), len(text)]
    return b"".join(PACK[suffix](text[a:b]) for a, b in itertools.pairwise(edges))


@pytest.mark.parametrize("suffix", PACK)
@settings(max_examples=25, deadline=None)
@given(
    places=st.lists(st.integers(0, len(TEXT) + 10), min_size=1, max_size=12),
    cuts=st.lists(st.integers(0, len(TEXT)), max_size=4),
    spacing=st.sampled_from([1, 4_096, 100_000]),
    lookahead=st.sampled_from([1, 300, 100_000]),
)
def test_it_is_entered_at_any_byte(
    tmp_path_factory: pytest.TempPathFactory,
    suffix: str,
    places: list[int],
    cuts: list[int],
    spacing: int,
    lookahead: int,
) -> None:
    file = tmp_path_factory.mktemp("d") / f"x.jsonl{suffix}"
    file.write_bytes(members(TEXT, suffix, cuts) + (b"\0" * 700 if suffix == ".gz" else b""))
    entries = Entries(spacing)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(decompressed, "_PIECE", 2_000)
        for _ in range(2):  # by places that the first stream has found, too
            with open_rows(file, entries=entries) as stream:
                for place in places:
                    stream.seek(place)
                    assert stream.read(lookahead) == TEXT[place : place + lookahead]


def test_drawn_rows_are_read_without_what_lies_before_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The results are those of reading everything (test_counted_rows); this is about how much is decompressed for them."""
    monkeypatch.setattr(decompressed, "_PIECE", 4_096)
    monkeypatch.setattr("shortstack.data.counted_rows._ENTRY_SPACING", 8_192)
    file = tmp_path / "x.json.gz"
    file.write_bytes(gzip.compress(5 * TEXT))
    corpus = read_corpus(str(file), role="calibration", counted_beyond=0)
    real, taken = Decompressed._piece, []

    def counted(self: Decompressed) -> bytes | None:
        taken.append(1)
        return real(self)

    monkeypatch.setattr(Decompressed, "_piece", counted)
    for number in (9_999, 3, 7_500, 3_700):
        assert corpus.documents[number] == ROWS[number % 2_000]["text"]
    assert len(taken) < 4 * 24 < file.stat().st_size / 4_096


def test_states_are_few_however_large_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decompressed, "_PIECE", 512)
    monkeypatch.setattr("shortstack.data.counted_rows._ENTRY_SPACING", 1_024)
    monkeypatch.setattr("shortstack.data.counted_rows._MOST_ENTRIES", 10)
    for name in "abc":
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(TEXT))
    corpus = read_corpus(str(tmp_path), role="calibration", counted_beyond=0)
    files: Iterator[Any] = iter(corpus.documents._files)  # type: ignore[attr-defined]
    assert 3 <= sum(len(file._entries.places) for file in files) <= 10
