"""Sources of text: every kind of file, and errors that name file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shortstack.data.files import open_rows
from shortstack.data.instructions import read_instructions
from shortstack.data.sources import file_rows, read_corpus
from shortstack.data.text_stream import open_texts
from shortstack.errors import ShortstackError
from shortstack.evaluation.prompts import GenerationRequest
from tests import pico


def read(path: Path) -> list[str]:
    return read_corpus(str(path), role="calibration").documents


@pytest.mark.parametrize("suffix", [".txt", ".raw", ".tokens", ".text"])
def test_a_text_file_is_one_document(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes("\ufeffone\r\ntwo\r\n\r\nthree é".encode())
    assert read(path) == ["one\ntwo\n\nthree é"]


def test_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one", "more": 1}\n\n{"text": "two"}\n')
    (tmp_path / "b.json").write_text('[{"text": "three"}]')
    assert read(tmp_path / "a.jsonl") == ["one", "two"]
    assert read(tmp_path / "b.json") == ["three"]
    assert read(tmp_path) == ["one", "two", "three"]


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["one", "two"]}), tmp_path / "x.parquet")
    assert read(tmp_path / "x.parquet") == ["one", "two"]
    rows = [{"call": {"a": 1}, "text": "x"}, {"call": {"b": 2}, "text": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "z.parquet")
    assert [row for _, row in file_rows(tmp_path / "z.parquet")] == rows  # without the nulls that columns add inside
    (tmp_path / "y.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(ShortstackError, match=r"y\.parquet: not a parquet file"):
        read(tmp_path / "y.parquet")


def test_input_ids_and_messages(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"input_ids": [1, 2, 3]}\n')
    (tmp_path / "b.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    assert read_corpus(str(tmp_path / "a.jsonl"), role="calibration").windows == [[1, 2, 3]]
    assert len(read_corpus(str(tmp_path / "b.jsonl"), role="calibration").chats) == 1
    with pytest.raises(ShortstackError, match="mixes rows"):
        read_corpus(str(tmp_path), role="calibration")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"", "no usable text"),
        ("x.txt", b" \n\n \t", "no usable text"),
        ("x.txt", b"abc\xff\xfe", r"not UTF-8 at byte 3"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "b"\n', r"x.jsonl, line 2: not valid JSON"),
        (
            "x.jsonl",
            b'{"text": "a"}\n\n{"body": "b", "n": 1}',
            r"x.jsonl, line 3: no text, input_ids or messages \(found: body, n\)",
        ),
        ("x.jsonl", b"[1]", r"line 1: expected an object, found list"),
        ("x.jsonl", b'{"input_ids": [1, -2]}', r"line 1: input_ids must be whole numbers >= 0"),
        ("x.json", b'{"text": "a"}', r"expected a JSON list of rows, found one object \(keys: text\)"),
        ("x.jsonl", b'{"text": "a"}\n{"text": null}', "x.jsonl, line 2: text is null, expected a string"),
        ("x.jsonl", b'{"text": 5}', "x.jsonl, line 1: text is 5, expected a string"),
        ("x.jsonl", b'{"text": "a"}\n\0\0\0', "x.jsonl, line 2: NUL bytes"),
        ("x.jsonl", b'{"text": "a", "text": "b"}', "x.jsonl, line 1: not valid JSON: duplicate key text"),
        ("x.doc", b"abc", "unknown file type"),
    ],
)
@pytest.mark.fault(41, 42, 43)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ShortstackError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        ('{"version": "1", "data": [{"text": "a"}]}', "jq .data x.json"),
        ('{"text": {"0": "a", "1": "b"}}', "orient='records'"),
        ('{"text": "a"}', "name the file .jsonl"),
    ],
)
def test_an_object_in_place_of_rows_is_refused_with_a_way_on(tmp_path: Path, content: str, hint: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ShortstackError, match="found one object") as error:
        read(tmp_path / "x.json")
    assert hint in error.value.hint


_ROW = '{"text": "%s", "instruction": "a", "output": "b"}\n'
HALF = _ROW % "a pair \\ud83d\\ude00" + _ROW % "half \\ud83d of one"


@pytest.mark.fault(101)
@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_half_a_character_is_refused_by_line(tmp_path: Path, name: str) -> None:
    """JSON may hold it, text may not: tokenizers raise a TypeError for it."""
    file = tmp_path / name
    file.write_text(HALF if name == "x.jsonl" else f"[{HALF.strip().replace(chr(10), ',')}]")
    place = "line 2" if name == "x.jsonl" else "row 2"
    message = rf"{name}, {place}: a lone surrogate \(\\ud83d\)"
    for reader in (
        read,
        lambda path: list(open_texts(str(path)).pieces(1000)),
        lambda path: read_instructions(str(path), pico.tokenizer(), cutoff=100),
        lambda path: GenerationRequest.read(path),
    ):
        with pytest.raises(ShortstackError, match=message):
            reader(file)
    file.write_text(HALF.splitlines()[0] if name == "x.jsonl" else f"[{HALF.splitlines()[0]}]")
    assert read(file) == ["a pair \U0001f600"]


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ShortstackError, match="no such file or folder"):
        read(tmp_path / "x.txt")
    with pytest.raises(ShortstackError, match="no text in this folder"):
        read(tmp_path)


def test_the_hash_is_of_the_bytes(tmp_path: Path) -> None:
    import hashlib

    (tmp_path / "x.txt").write_bytes(b"a\r\nb")
    assert read_corpus(str(tmp_path / "x.txt"), role="evaluation").sha256 == hashlib.sha256(b"a\r\nb").hexdigest()


def test_embedded_text_is_split_without_near_duplicates() -> None:
    """No run of 13 words stands on both sides of the split (on the Python that it was made with)."""
    import re

    from shortstack.data import embedded

    made_with = json.loads(embedded.HELDOUT_NAMES.read_text())["python"]

    def grams(texts: list[str]) -> set[tuple[str, ...]]:
        found = set()
        for text in texts:
            words = re.findall(r"\w+", text.lower())
            found.update(tuple(words[k : k + 13]) for k in range(len(words) - 12))
        return found

    training = read_corpus("embedded", role="calibration")
    heldout = read_corpus("embedded", role="evaluation")
    assert heldout.rows > 100
    assert "held-out part" in heldout.detail
    assert not set(training.documents) & set(heldout.documents)
    shared = grams(training.documents) & grams(heldout.documents)
    assert not shared or (made_with != embedded.python_name() and len(shared) < 0.02 * len(grams(heldout.documents)))


def test_rows_in_zstandard_frames(tmp_path: Path) -> None:
    """As SlimPajama has them; a place in the middle is found by reading on."""
    zstandard = pytest.importorskip("zstandard")
    lines = [b'{"text": "row %d"}\n' % number for number in range(300)]
    file = tmp_path / "a.jsonl.zst"
    file.write_bytes(zstandard.compress(b"".join(lines[:100])) + zstandard.compress(b"".join(lines[100:])))
    plain = tmp_path / "b.jsonl"
    plain.write_bytes(b"".join(lines))
    assert read_corpus(str(file), role="training").documents == read_corpus(str(plain), role="training").documents
    start = len(b"".join(lines[:150]))
    with open_rows(file, start) as found, open_rows(plain, start) as expected:
        assert found.read() == expected.read()
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ShortstackError, match=r"a.jsonl.zst"):
        read_corpus(str(file), role="training")
    file.write_bytes(b"no frames at all")
    with pytest.raises(ShortstackError, match="not zstd, or broken"):
        read_corpus(str(file), role="training")
