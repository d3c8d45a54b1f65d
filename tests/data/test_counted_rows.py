"""Sources of very many rows: counted, drawn among all of them, and only what is drawn is read; the same windows as ever."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shortstack.data import calibration, counted_rows
from shortstack.data.calibration import CalibrationOptions, CalibrationSet, draw_windows
from shortstack.data.counted_rows import CountedRows
from shortstack.data.hub_datasets import NAMED_SETS
from shortstack.data.sources import read_corpus
from shortstack.errors import ShortstackError
from shortstack.scoring.score import score
from tests import pico

ROWS = 5_000
TOKENIZER = pico.tokenizer()
pytestmark = pytest.mark.fault(105)


def sentences(rows: int = ROWS, long_every: int = 400) -> list[str]:
    """Nearly all are too short for a window, as those of BookCorpus are."""
    words = random.Random(3)
    return [
        f"row {number} "
        + "".join(words.choice("abcdefgh ") for _ in range(200 if number % long_every == 7 % long_every else 9))
        for number in range(rows)
    ]


def write(folder: Path, kind: str, texts: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps({"text": text}) + "\n" + ("\n" if n % 97 == 5 else "") for n, text in enumerate(texts))
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        half = len(texts) // 2
        for name, part in (("a", texts[:half]), ("b", texts[half:])):
            pq.write_table(pa.table({"text": part}), folder / f"{name}.parquet", row_group_size=50)
        return folder
    if kind == "list.json":
        (folder / "x.json").write_text(json.dumps([{"text": text} for text in texts]))
    elif kind == "jsonl.gz":
        with gzip.open(folder / "x.jsonl.gz", "wt") as stream:
            stream.write(lines)
    elif kind == "jsonl.zst":
        import zstandard

        (folder / "x.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))
    else:
        (folder / f"x.{kind}").write_text(lines)
    return folder


KINDS = ["parquet", "jsonl", "json", "jsonl.gz", "jsonl.zst", "list.json"]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_by_number_are_the_rows_that_reading_all_gives(tmp_path: Path, kind: str) -> None:
    texts = sentences(1_000)
    source = str(write(tmp_path / "s", kind, texts))
    counted = read_corpus(source, role="calibration", counted_beyond=0)
    assert isinstance(counted.documents, CountedRows)
    assert read_corpus(source, role="calibration", counted_beyond=10**9).documents == texts
    assert len(counted.documents) == counted.rows == 1_000
    for number in random.Random(1).sample(range(1_000), 40):
        assert counted.documents[number] == texts[number]
    counted.documents.fetch([999, 0, 500, 501, 3])
    assert [counted.documents[number] for number in (0, 3, 500, 501, 999)] == [texts[n] for n in (0, 3, 500, 501, 999)]
    assert counted.documents[5:8] == texts[5:8]
    with pytest.raises(IndexError):
        _ = counted.documents[1_000]


BLANKS = ["", " \t", "\u00a0", "\u3000", "\u2028", "\x85", "\x1e", "\ufeff"]


@pytest.mark.parametrize("at", [0, 5, 300])
@pytest.mark.parametrize("blank", BLANKS, ids=ascii)
def test_lines_are_blank_to_the_count_where_they_are_to_the_reader(tmp_path: Path, blank: str, at: int) -> None:
    texts = [f"row {number}" for number in range(300)]
    lines = [json.dumps({"text": text}) for text in texts]
    file = tmp_path / "x.jsonl"
    file.write_bytes("\n".join([*lines[:at], blank, *lines[at:], ""]).encode())
    found = read_corpus(str(file), role="calibration", counted_beyond=0)
    if blank == "\ufeff" and at:  # a byte order mark means something at the start of a file only
        with pytest.raises(ShortstackError, match=f"line {at + 1}: not valid JSON"):
            _ = found.documents[at]
        return
    assert read_corpus(str(file), role="calibration", counted_beyond=10**9).documents == texts
    assert found.rows == 300
    assert [found.documents[number] for number in range(300)] == texts


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz"])
@pytest.mark.parametrize("seed", [0, 1, 1234])
def test_the_published_windows_are_those_of_reading_everything(tmp_path: Path, kind: str, seed: int) -> None:
    source = str(write(tmp_path / "s", kind, sentences()))
    options = CalibrationOptions(samples=8, seq_len=64, seed=seed, sampling="published")
    drawn = [_drawn(source, options, counted_beyond=beyond) for beyond in (None, 0)]
    assert drawn[0].windows == drawn[1].windows
    assert drawn[0].record["marks"] == drawn[1].record["marks"]
    assert drawn[0].record["rows"] == drawn[1].record["rows"] == ROWS


def test_only_the_row_groups_that_hold_drawn_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = str(write(tmp_path / "s", "parquet", sentences(long_every=2)))  # half of the rows are long enough
    read: list[int] = []
    real = counted_rows.opened_parquet

    @contextmanager
    def opened(file: Path) -> Iterator[Any]:
        with real(file) as table:

            class Watched:
                metadata, num_row_groups = table.metadata, table.num_row_groups

                def iter_batches(self, *, batch_size: int, row_groups: list[int]) -> Any:
                    read.extend(row_groups)
                    return table.iter_batches(batch_size=batch_size, row_groups=row_groups)

            yield Watched()

    monkeypatch.setattr(counted_rows, "opened_parquet", opened)
    corpus = read_corpus(source, role="calibration", counted_beyond=0)
    assert len(read) == 1  # the first row says of which kind all are
    draw_windows(corpus, TOKENIZER, options=CalibrationOptions(samples=2, seq_len=64, sampling="published"))
    assert isinstance(corpus.documents, CountedRows)
    assert len(corpus.documents._held) <= calibration._FEWEST_AHEAD
    assert len(read) <= 1 + 3 * calibration._FEWEST_AHEAD  # of 100 row groups; windows of rows that are drawn together


def _drawn(source: str, options: CalibrationOptions, *, counted_beyond: int | None) -> CalibrationSet:
    corpus = read_corpus(source, role="calibration", counted_beyond=counted_beyond)
    return draw_windows(corpus, TOKENIZER, options=options)


def test_too_few_long_rows_are_the_same_error(tmp_path: Path) -> None:
    source = str(write(tmp_path / "s", "jsonl", sentences(200, long_every=100)))
    options = CalibrationOptions(samples=8, seq_len=64, sampling="published")
    messages = []
    for beyond in (None, 0):
        with pytest.raises(ShortstackError, match="needs 8 rows of at least 64 tokens, 2 of 200 rows are") as refused:
            _drawn(source, options, counted_beyond=beyond)
        messages.append(refused.value.message)
    assert messages[0] == messages[1]


def test_rows_of_another_kind_and_broken_rows_are_refused_when_they_are_drawn(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": "a"}\n{"input_ids": [1, 2]}\n{"text": \n')
    rows = read_corpus(str(file), role="calibration", counted_beyond=0).documents
    with pytest.raises(ShortstackError, match="line 3: not valid JSON"):
        _ = rows[2]
    with pytest.raises(ShortstackError, match="mixes rows"):
        _ = rows[1]


def test_chats_and_windows_are_counted_too(tmp_path: Path) -> None:
    tokenizer = pico.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    chats = tmp_path / "c.jsonl"
    chats.write_text(
        "".join(json.dumps({"messages": [{"role": "user", "content": "x" * n}]}) + "\n" for n in range(90))
    )
    options = CalibrationOptions(samples=4, seq_len=40, sampling="published", chat_template=True)
    with pytest.raises(ShortstackError, match="published sampling needs 4 rows"):  # no chat has an answer to count
        draw_windows(read_corpus(str(chats), role="calibration"), tokenizer, options=options)
    options = replace(options, count_prompts=True)
    found = [
        draw_windows(
            read_corpus(str(chats), role="calibration", counted_beyond=beyond), tokenizer, options=options
        ).windows
        for beyond in (None, 0)
    ]
    assert found[0] == found[1]
    given = tmp_path / "w.jsonl"
    given.write_text("".join(json.dumps({"input_ids": [n, n + 1]}) + "\n" for n in range(500)))
    corpus = read_corpus(str(given), role="calibration", counted_beyond=0)
    assert draw_windows(corpus, None, options=CalibrationOptions(samples=3, seq_len=2)).windows == [
        [0, 1],
        [1, 2],
        [2, 3],
    ]


def test_scores_are_the_same(tmp_path: Path, built: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source = str(write(tmp_path / "s", "parquet", sentences()))
    found = []
    for beyond in (10**9, 0):
        monkeypatch.setattr("shortstack.scoring.score._CALIBRATION_BYTES", beyond)
        scores = score(str(built("llama")), data=source, sampling="published", samples=3, seq_len=32, quiet=True)
        found.append(scores.criterion("ppl").scores)
    assert found[0] == found[1]


def test_c4_for_calibration_is_its_first_file_and_bookcorpus_all_of_it() -> None:
    """As published: GPTQ and those after it draw from the first file of C4."""
    assert NAMED_SETS["c4"].pattern("calibration") == "en/c4-train.00000-of-01024.json.gz"
    assert NAMED_SETS["c4"].pattern("training") == "en/c4-train.*.json.gz"
    assert NAMED_SETS["bookcorpus"].pattern("calibration") == "plain_text/train/*.parquet"
