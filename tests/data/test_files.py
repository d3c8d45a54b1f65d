"""Which files are read: splits by role, nothing hidden, no records of the datasets library; what is skipped is reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shortstack.common.progress import Progress
from shortstack.data.files import files_for, source_files, split_of
from shortstack.data.instructions import kind_of, read_instructions
from shortstack.data.sources import read_corpus
from shortstack.data.text_stream import open_texts
from shortstack.errors import ShortstackError
from tests import pico

pytestmark = pytest.mark.fault(102)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00001.parquet", "train"), ("data/test.jsonl", "test"), ("test/0000.parquet", "test"),
        ("wiki.valid.raw", "validation"), ("dev.json", "validation"), ("TRAIN.txt", "train"), ("val2.jsonl", "validation"),
        ("train/test.jsonl", "test"), ("latest.jsonl", None), ("contest.txt", None), ("trained.jsonl", None),
        ("notes.txt", None), ("train_sft-1.parquet", "train"),
    ],
)  # fmt: skip
def test_a_split_is_a_word_of_the_name(name: str, split: str | None) -> None:
    assert split_of(name) == split


SPLITS = ["train.jsonl", "test.jsonl", "validation.jsonl", "more.jsonl", ".DS_Store", "._train.jsonl", "README.md"]


def test_the_split_goes_with_the_role() -> None:
    assert files_for("d", SPLITS, "training") == ["more.jsonl", "train.jsonl"]
    assert files_for("d", SPLITS, "calibration") == ["more.jsonl", "train.jsonl"]
    assert files_for("d", SPLITS, "evaluation") == ["test.jsonl"]
    assert files_for("d", ["train.jsonl", "dev.jsonl"], "evaluation") == ["dev.jsonl"]
    assert files_for("d", ["train.jsonl", "a.txt"], "evaluation") == ["a.txt", "train.jsonl"]
    for role in ("training", "calibration"):
        with pytest.raises(ShortstackError, match="d: holds only a test or validation split .test.jsonl.") as error:
            files_for("d", ["test.jsonl", "README.md"], role)  # type: ignore[arg-type]
        assert "give the file itself" in error.value.hint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As a set comes from the hub by way of a Mac."""
    rows = [{"instruction": "say", "output": "it"}, {"instruction": "say", "output": "this"}]
    for name in ("train.jsonl", "test.jsonl"):
        word = name.partition(".")[0]
        lines = [json.dumps({**row, "text": f"a row of {word} that is long enough"}) for row in rows]
        (tmp_path / name).write_text("".join(line + "\n" for line in lines))
    (tmp_path / "._train.jsonl").write_bytes(b"\x00\x05\xff\xfe")
    (tmp_path / "dataset_infos.json").write_text('{"default": {}}')
    (tmp_path / "README.md").write_text("# data")
    return tmp_path


def test_what_is_read_and_what_is_skipped_is_reported(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = read_corpus(str(folder), role="calibration", progress=Progress())
    assert all("train" in text for text in corpus.documents)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"{folder}: reads train.jsonl; skipped: ")
    for reason in (
        "._train.jsonl (hidden)", "README.md (no rows or text)", "test.jsonl (test split)",
        "dataset_infos.json (a record of the datasets library)",
    ):  # fmt: skip
        assert reason in first
    assert second == f"{folder}: 2 documents read from 1 file"
    assert all("test" in text for text in read_corpus(str(folder), role="evaluation").documents)


def test_training_reads_the_same_files_and_reports_them(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kind_of(str(folder)) == "instructions"
    assert len(read_instructions(str(folder), pico.tokenizer(), cutoff=400, progress=Progress()).examples) == 2
    texts = open_texts(str(folder), progress=Progress())
    assert [file.name for file in texts.files] == ["train.jsonl"]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert all("test.jsonl (test split)" in line for line in said)


def test_blank_rows_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a text"}\n{"text": ""}\n\n{"text": " "}\n')
    read_corpus(str(tmp_path / "a.jsonl"), role="calibration", progress=Progress())
    assert capsys.readouterr().err == f"{tmp_path}/a.jsonl: 3 documents read from 1 file, 2 of them blank\n"


def test_a_folder_that_was_saved_to_disk(tmp_path: Path) -> None:
    for name in ("whole/data-00000-of-00001.arrow", "splits/train/data-00000-of-00001.arrow"):
        file = tmp_path / name
        file.parent.mkdir(parents=True)
        file.write_bytes(b"ARROW1")
        (file.parent / "state.json").write_text("{}")
        (file.parent / "dataset_info.json").write_text("{}")
    for name in ("whole", "splits"):
        with pytest.raises(ShortstackError, match=f"{name}: was written by save_to_disk") as error:
            source_files(str(tmp_path / name), role="training")
        assert "load_from_disk" in error.value.hint


def test_files_in_a_folder_below_are_named(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(ShortstackError, match=f"no text in this folder, but in {tmp_path}/data"):
        source_files(str(tmp_path), role="training")
