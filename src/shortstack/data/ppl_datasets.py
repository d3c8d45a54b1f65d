"""Texts whose perplexity is measured: the published sets by name, from local copies or the hub; and any other SOURCE.

A named set is the split that the published figures are computed on, as rows: WikiText2's test split, the validation split of
the Penn Treebank, and the first 1100 documents of C4's validation split (as GPTQ and its followers measure it).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from shortstack.common.progress import Progress
from shortstack.data.files import TEXT_SUFFIXES, suffix_of
from shortstack.data.hub_datasets import hub_files
from shortstack.data.json_rows import Budget, decoded
from shortstack.data.sources import Corpus, file_rows, read_corpus, required_text
from shortstack.errors import ShortstackError, UsageError, system_reason

_C4_DOCUMENTS = 1100
# Where a local copy lies below --data-dir: the published file itself, or the hub's own layout.
LOCAL_COPIES = {
    "wikitext2": (
        "wikitext2/wiki.test.raw", "wikitext-2-raw/wiki.test.raw", "wikitext-2-raw-v1/test-*.parquet", "wiki.test.raw",
    ),
    "ptb": ("ptb/ptb.valid.txt", "penn_treebank/validation/*.parquet", "ptb.valid.txt"),
    "c4": ("c4/c4-validation.*.json.gz", "en/c4-validation.*.json.gz", "c4-validation.*.json.gz", "c4/*.jsonl", "c4*.jsonl"),
}  # fmt: skip


def evaluation_texts(data: str, data_dir: Path | None, progress: Progress | None = None) -> list[Corpus]:
    """The texts that a comma-separated list names.

    Args:
        data: published names, files, folders, hub ids or `embedded`.
        data_dir: where local copies of the published sets lie; without it they come from the hub.
        progress: reports what was read and skipped of files and folders.

    Raises:
        ShortstackError: one cannot be found or read.
    """
    if data_dir is not None and not Path(data_dir).is_dir():
        raise UsageError(f"--data-dir {data_dir}: no such folder")
    return [_text(source, data_dir, progress) for source in text_names(data)]


def text_names(data: str) -> list[str]:
    """`wikitext2,ptb` -> two names.

    Raises:
        UsageError: there is none.
    """
    names = [source.strip() for source in data.split(",") if source.strip()]
    if not names:
        raise UsageError(
            f"--data {data!r}: names no text", hint="give --data embedded, a file, a folder, or a data set on the hub"
        )
    return names


def _text(source: str, data_dir: Path | None, progress: Progress | None) -> Corpus:
    if source not in LOCAL_COPIES:
        return read_corpus(source, role="evaluation", progress=progress)
    if data_dir is not None:
        return _rows_of(source, _local_files(source, Path(data_dir)))
    return _rows_of(source, hub_files(source, role="evaluation"))


def _local_files(name: str, folder: Path) -> Sequence[Path]:
    for pattern in LOCAL_COPIES[name]:
        found = sorted(path for path in folder.glob(pattern) if path.is_file())
        if found:
            return found
    raise ShortstackError(
        f"{folder}: no copy of {name} (searched for {', '.join(LOCAL_COPIES[name])})",
        hint="put the published file there, or leave --data-dir out to get it from the hub",
    )


def _rows_of(name: str, files: Sequence[Path]) -> Corpus:
    """All rows of a published set, as the hub's rows are."""
    budget = Budget(None)
    rows: list[str] = []
    wanted = _C4_DOCUMENTS if name == "c4" else None
    for number in range(len(files)):
        file = Path(files[number])
        try:
            left = None if wanted is None else wanted - len(rows)
            rows += itertools.islice(_file_texts(name, file, budget), left)
        except OSError as error:
            raise ShortstackError(f"{file}: cannot be read ({system_reason(error)})") from None
        if wanted is not None and len(rows) >= wanted:
            break
    if not any(row.strip() for row in rows):
        raise ShortstackError(f"{name}: no usable text in {files[0]}", hint="download the published file again")
    where = "local copy" if isinstance(files, list) else "hub"
    cut = f", its first {len(rows)} documents" if wanted is not None else ""
    return Corpus(name, budget.digest.hexdigest(), rows, detail=f"{where}, {Path(files[0]).name}{cut}")


def _file_texts(name: str, file: Path, budget: Budget) -> Iterator[str]:
    if suffix_of(file) in TEXT_SUFFIXES:
        lines = decoded(file, budget.take(file.read_bytes()), 0).replace("\r\n", "\n").split("\n")
        for line in lines[:-1] if lines[-1] == "" else lines:
            # As the hub's rows: of WikiText an empty line is "", any other keeps its line end; of PTB each is stripped.
            yield (line + "\n" if line.strip() else "") if name == "wikitext2" else line.strip()
        return
    for place, row in file_rows(file, budget):
        yield required_text(file, place, row)
