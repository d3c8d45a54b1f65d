"""Where texts come from: the embedded text, files (.txt .jsonl .json .parquet), folders of them, sets on the hub."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from shortstack.common.json_text import json_text
from shortstack.data.compression import open_rows
from shortstack.errors import ShortstackError, UsageError, first_line, system_reason

TEXT_SUFFIXES = (".txt", ".raw", ".tokens", ".text")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz", ".jsonl.zst")

_LONGEST_ROW = 64 << 20  # bytes of one line

Role = Literal["calibration", "evaluation", "training"]


@dataclass(frozen=True)
class Corpus:
    """Texts, or windows of token ids that are taken as they stand, or chats for a template.

    Attributes:
        source: what the user called it.
        sha256: of the bytes that were read.
        documents: the texts (a text file is one).
        windows: token ids, where the rows hold `input_ids`.
        chats: lists of messages, where the rows hold `messages`.
        detail: what else figures should name (the Python version, for the embedded text).
    """

    source: str
    sha256: str
    documents: list[str] = field(default_factory=list)
    windows: list[list[int]] = field(default_factory=list)
    chats: list[list[dict[str, Any]]] = field(default_factory=list)
    detail: str = ""

    @property
    def rows(self) -> int:
        """Number of documents, windows or chats."""
        return len(self.documents) + len(self.windows) + len(self.chats)

    def described(self) -> dict[str, Any]:
        """What a record says about the texts."""
        described: dict[str, Any] = {"source": self.source, "sha256": self.sha256, "rows": self.rows}
        return {**described, "detail": self.detail} if self.detail else described


def read_corpus(source: str, *, role: Role, limit_bytes: int | None = None) -> Corpus:
    """Read all rows of a SOURCE: `embedded`, a file, or a folder of files.

    Args:
        source: `embedded`, or the path of a .txt .raw .tokens .text (one document each), .jsonl or .json (rows with
            `text`, `input_ids` or `messages`) or .parquet file, or of a folder of such files, read in name order.
        role: which part of the embedded text: what the model was trained on, or what was held out.
        limit_bytes: read about this much and no more, however large the files are; the record says so.

    Raises:
        ShortstackError: nothing there, not UTF-8, a broken row, or no usable text.
    """
    if source == "embedded":
        return _embedded(role)
    files = source_files(source, role=role)
    budget = Budget(limit_bytes)
    corpus = Corpus(source, "")
    for file in files:
        try:
            _read_file(Path(file), corpus, budget)
        except OSError as error:
            raise ShortstackError(
                f"{file}: cannot be read ({system_reason(error)})",
                hint="check the path and its rights",
            ) from None
    detail = f"the first {budget.read} bytes" if budget.is_cut else ""
    corpus = Corpus(source, budget.digest.hexdigest(), corpus.documents, corpus.windows, corpus.chats, detail)
    if not corpus.windows and not corpus.chats and not any(text.strip() for text in corpus.documents):
        raise ShortstackError(f"{source}: no usable text (empty or blank)", hint="give a source that holds text")
    if sum(map(bool, (corpus.documents, corpus.windows, corpus.chats))) > 1:
        raise ShortstackError(f"{source}: mixes rows of text, input_ids and messages", hint="keep one kind per source")
    return corpus


def source_files(source: str, *, role: Role) -> Sequence[Path]:
    """The files of a SOURCE that is not `embedded`: one, those of a folder in name order, or a hub set's.

    A hub set's files are downloaded when they are asked for, one by one.

    Raises:
        ShortstackError: nothing there.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if suffix_of(file) in SUFFIXES and file.is_file())
        if not files:
            raise ShortstackError(
                f"{source}: no text in this folder", hint=f"expected files ending in {' '.join(SUFFIXES)}"
            )
        return files
    if path.exists():
        return [path]
    from shortstack.data.hub_datasets import hub_files

    return hub_files(source, role=role)


def suffix_of(file: Path) -> str:
    """The end of a file's name that says what it holds, such as `.jsonl` or `.jsonl.gz`."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    return "".join(suffixes[-2:]) if suffixes[-1:] in ([".gz"], [".zst"]) else "".join(suffixes[-1:])


def _embedded(role: Role) -> Corpus:
    from shortstack.data import embedded

    chosen = embedded.heldout_documents() if role == "evaluation" else embedded.training_documents()
    texts = [document.text for document in chosen]
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    part = "held-out part" if role == "evaluation" else "training part"
    return Corpus(
        "embedded", digest, texts, detail=f"{part} of the docstrings and help topics of {embedded.python_name()}"
    )


@dataclass
class Budget:
    """How much may still be read, and the hash of what was."""

    limit: int | None
    digest: Any = field(default_factory=hashlib.sha256)
    read: int = 0
    is_cut: bool = False

    def take(self, data: bytes) -> bytes:
        """Count and hash what was read."""
        self.digest.update(data)
        self.read += len(data)
        return data

    @property
    def left(self) -> int:
        """Bytes that may still be read; -1 for any number."""
        return -1 if self.limit is None else max(0, self.limit - self.read)


def _read_file(file: Path, corpus: Corpus, budget: Budget) -> None:
    if suffix_of(file) not in TEXT_SUFFIXES:
        return _add_rows(file, file_rows(file, budget), corpus)
    if budget.left == 0:
        budget.is_cut = True
        return None
    with file.open("rb") as stream:
        data = budget.take(stream.read(budget.left))
        more = bool(stream.read(1))
        budget.is_cut |= more
        corpus.documents.append(decoded(file, data, 0, cut=more).replace("\r\n", "\n"))
    return None


def file_rows(file: Path, budget: Budget | None = None) -> Iterator[tuple[str, Any]]:
    """(place, row) of each row of a .jsonl, .json or .parquet file, one at a time, until the budget is spent.

    Raises:
        ShortstackError: not such a file, not UTF-8, or a broken row.
    """
    suffix = suffix_of(file)
    if suffix not in SUFFIXES or suffix in TEXT_SUFFIXES:
        raise ShortstackError(f"{file}: unknown kind of file", hint=f"expected one ending in {' '.join(SUFFIXES)}")
    if budget is not None and budget.left == 0:
        budget.is_cut = True
    elif suffix == ".parquet":
        yield from _parquet_rows(file, budget)
    else:
        budget = budget or Budget(None)
        with open_rows(file) as stream:
            if suffix.startswith(".jsonl") or _holds_lines(stream):
                for place, row, _ in json_lines(file, stream, budget):
                    yield place, row
                return
            rows = _parse(file, "", decoded(file, budget.take(stream.read()), 0))
            if not isinstance(rows, list):
                raise ShortstackError(f"{file}: expected a JSON list of rows, found {type(rows).__name__}")
            yield from ((f"row {n}", row) for n, row in enumerate(rows, start=1))


def _holds_lines(stream: IO[bytes]) -> bool:
    """Whether a .json file is one of lines, as the hub's c4 is: two rows side by side are no JSON text."""
    first, second = stream.readline(_LONGEST_ROW).strip(), stream.readline(_LONGEST_ROW).strip()
    stream.seek(0)
    return first.startswith(b"{") and first.endswith(b"}") and second.startswith(b"{")


def json_lines(
    file: Path, stream: IO[bytes], budget: Budget, *, start: int = 0, number: int = 1
) -> Iterator[tuple[str, Any, int]]:
    """(place, row, where the next line starts) of each line that is not blank, until the budget is spent.

    Args:
        file: what errors call it.
        stream: stands at byte `start`, where line `number` begins.
        budget: what may be read.
    """
    for line_number in itertools.count(number):
        raw = stream.readline(_LONGEST_ROW)
        if not raw:
            return
        if len(raw) == _LONGEST_ROW:
            raise ShortstackError(
                f"{file}, line {line_number}: longer than {_LONGEST_ROW >> 20} MiB", hint="is this a .txt file?"
            )
        line = decoded(file, budget.take(raw), start).strip()
        start += len(raw)
        if line:
            yield f"line {line_number}", _parse(file, f"line {line_number}", line), start
        if budget.left == 0:
            budget.is_cut = bool(stream.read(1))
            return


def decoded(file: Path, data: bytes, start: int, *, cut: bool = False) -> str:
    """Strict UTF-8, with or without a byte order mark at the start of the file.

    Args:
        start: where in the file the data begins, for errors.
        cut: the data may end inside a character.
    """
    if start == 0:
        data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if cut and len(data) - error.start < 4 and error.reason == "unexpected end of data":
            return data[: error.start].decode("utf-8")
        raise ShortstackError(
            f"{file}: not UTF-8 at byte {start + error.start}", hint="convert the file to UTF-8"
        ) from None


def _parse(file: Path, place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        where = f", {place}" if place else ""
        raise ShortstackError(f"{file}{where}: not valid JSON: {error}", hint="correct or remove it") from None


def _parquet_rows(file: Path, budget: Budget | None) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UsageError(f"{file}: reading parquet needs pyarrow", hint="pip install 'shortstack[parquet]'") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    if budget is not None:
                        budget.take(json_text(row, default=str, sort_keys=True).encode())
                    yield f"row {number}", row
                if budget is not None and budget.left == 0:
                    budget.is_cut = number < table.metadata.num_rows
                    return
    except pyarrow.ArrowException as error:
        raise ShortstackError(f"{file}: not a parquet file ({first_line(error)})", hint="download it again") from None


def _add_rows(file: Path, rows: Iterable[tuple[str, Any]], corpus: Corpus) -> None:
    for place, row in rows:
        if not isinstance(row, dict):
            raise ShortstackError(f"{file}, {place}: expected an object, found {type(row).__name__}")
        if isinstance(row.get("input_ids"), list):
            ids = row["input_ids"]
            if not all(type(token) is int and token >= 0 for token in ids):
                raise ShortstackError(f"{file}, {place}: input_ids must be whole numbers >= 0")
            corpus.windows.append(ids)
        elif isinstance(row.get("messages"), list):
            corpus.chats.append(row["messages"])
        elif (text := row_text(row)) is not None:
            corpus.documents.append(text)
        else:
            found = ", ".join(map(str, row)) or "nothing"
            raise ShortstackError(f"{file}, {place}: no text, input_ids or messages (found: {found})")


def row_text(row: dict[str, Any]) -> str | None:
    """The text of a row, under the names that published sets give it; None where there is none."""
    if isinstance(row.get("text"), str):
        return str(row["text"])
    return row["sentence"].strip() if isinstance(row.get("sentence"), str) else None  # PTB as published
