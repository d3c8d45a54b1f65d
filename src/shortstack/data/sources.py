"""Where texts come from: the embedded text, files (.txt .jsonl .json .parquet), folders of them, sets on the hub."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from shortstack.common.json_text import json_text
from shortstack.common.progress import Progress
from shortstack.data.chats import Chat, chat_of, is_chat
from shortstack.data.files import SUFFIXES, TEXT_SUFFIXES, Role, open_rows, source_files, suffix_of
from shortstack.errors import ShortstackError, system_reason

_LONGEST_ROW = 64 << 20  # bytes of one line
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # escaped: half a character, or one of a pair


@dataclass(frozen=True)
class Corpus:
    """Texts, or windows of token ids that are taken as they stand, or chats for a template.

    Attributes:
        source: what the user called it.
        sha256: of the bytes that were read.
        documents: the texts (a text file is one).
        windows: token ids, where the rows hold `input_ids`.
        chats: for a template, where the rows hold `messages` or `conversations`.
        detail: what else figures should name (the Python version, for the embedded text).
    """

    source: str
    sha256: str
    documents: list[str] = field(default_factory=list)
    windows: list[list[int]] = field(default_factory=list)
    chats: list[Chat] = field(default_factory=list)
    detail: str = ""

    @property
    def rows(self) -> int:
        """Number of documents, windows or chats."""
        return len(self.documents) + len(self.windows) + len(self.chats)

    def described(self) -> dict[str, Any]:
        """What a record says about the texts."""
        described: dict[str, Any] = {"source": self.source, "sha256": self.sha256, "rows": self.rows}
        return {**described, "detail": self.detail} if self.detail else described


def read_corpus(source: str, *, role: Role, limit_bytes: int | None = None, progress: Progress | None = None) -> Corpus:
    """Read all rows of a SOURCE: `embedded`, a file, or a folder of files.

    Args:
        source: `embedded`, or the path of a .txt .raw .tokens .text (one document each), .jsonl or .json (rows with
            `text`, `input_ids` or `messages`) or .parquet file, or of a folder of such files, read in name order; of a
            folder with splits, those that go with the role.
        role: which part of the embedded text: what the model was trained on, or what was held out.
        limit_bytes: read about this much and no more, however large the files are; the record says so.
        progress: reports which files and how many rows were read, and what was skipped.

    Raises:
        ShortstackError: nothing there, not UTF-8, a broken row, or no usable text.
    """
    if source == "embedded":
        return _embedded(role)
    files = source_files(source, role=role, progress=progress)
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
    if progress is not None:
        progress.say(_summary(corpus, budget))
    return corpus


def _summary(corpus: Corpus, budget: Budget) -> str:
    """What was read, on one line."""
    blank = sum(not text.strip() for text in corpus.documents)
    kind = "windows" if corpus.windows else "chats" if corpus.chats else "documents"
    files = f"{budget.files} {'file' if budget.files == 1 else 'files'}"
    return (
        f"{corpus.source}: {corpus.rows} {kind if corpus.rows != 1 else kind[:-1]} read from {files}"
        + (f", {blank} of them blank" if blank else "")
        + (f" ({corpus.detail})" if corpus.detail else "")
    )


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
    files: int = 0
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
    budget.files += budget.left != 0
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
        from shortstack.data.parquet import parquet_rows

        yield from parquet_rows(file, budget)
    else:
        budget = budget or Budget(None)
        with open_rows(file) as stream:
            if suffix.startswith(".jsonl") or _holds_lines(stream):
                for place, row, _ in json_lines(file, stream, budget):
                    yield place, row
                return
            text = decoded(file, budget.take(stream.read()), 0)
            rows = _parse(file, "", text)
            if not isinstance(rows, list):
                raise _no_list(file, rows)
            for number, row in enumerate(rows, start=1):
                yield f"row {number}", _checked(file, f"row {number}", row, text)


def _no_list(file: Path, found: Any) -> ShortstackError:
    """What a .json file holds instead of a list of rows, and how to make one of it."""
    if not isinstance(found, dict):
        return ShortstackError(f"{file}: expected a JSON list of rows, found {type(found).__name__}")
    lists = [key for key, value in found.items() if isinstance(value, list)]
    if found and all(isinstance(value, dict) for value in found.values()):
        hint = "a table by columns? write its rows: to_json(FILE, orient='records', lines=True)"
    elif lists:
        hint = f"are the rows under {lists[0]}? write that list alone: jq .{lists[0]} {file.name}"
    else:
        hint = "one row? put it in brackets, [ ... ], or name the file .jsonl"
    keys = ", ".join(map(str, found)) or "none"
    return ShortstackError(f"{file}: expected a JSON list of rows, found one object (keys: {keys:.80})", hint=hint)


def _checked(file: Path, place: str, row: Any, text: str) -> Any:
    """A row without half characters: JSON may hold them, text may not, and no tokenizer takes them."""
    if _SURROGATE.search(text):
        try:
            json_text(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise ShortstackError(
                f"{file}, {place}: half of a character ({half}, a lone surrogate), so not valid text",
                hint="correct or remove the row",
            ) from None
    return row


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
            place = f"line {line_number}"
            yield place, _checked(file, place, _parse(file, place, line), line), start
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
        is_utf_16 = start == 0 and data[:2] in (b"\xff\xfe", b"\xfe\xff")
        hint = "is it UTF-16? iconv -f UTF-16 -t UTF-8" if is_utf_16 else "convert the file to UTF-8"
        raise ShortstackError(f"{file}: not UTF-8 at byte {start + error.start}", hint=hint) from None


def _parse(file: Path, place: str, text: str) -> Any:
    if text.startswith("\0"):
        raise ShortstackError(
            f"{file}, {place or 'its start'}: NUL bytes, not JSON", hint="was it cut off? get it again"
        )
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        where = f", {place}" if place else ""
        raise ShortstackError(f"{file}{where}: not valid JSON: {error}", hint="correct or remove it") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {next(key for key in keys if keys.count(key) > 1)}")
    return found


def _add_rows(file: Path, rows: Iterable[tuple[str, Any]], corpus: Corpus) -> None:
    for place, row in rows:
        if isinstance(row, dict) and isinstance(row.get("input_ids"), list):
            ids = row["input_ids"]
            if not all(type(token) is int and token >= 0 for token in ids):
                raise ShortstackError(f"{file}, {place}: input_ids must be whole numbers >= 0")
            corpus.windows.append(ids)
        elif isinstance(row, dict) and is_chat(row):
            corpus.chats.append(chat_of(f"{file}, {place}", row))
        else:
            corpus.documents.append(required_text(file, place, row, expected="text, input_ids or messages"))


def required_text(file: Path, place: str, row: Any, *, expected: str = "text") -> str:
    """The text of a row.

    Args:
        file: the row's file.
        place: the row in it.
        row: what was read.
        expected: which fields a row may have here, for the error.

    Raises:
        ShortstackError: it has none.
    """
    if not isinstance(row, dict):
        raise ShortstackError(f"{file}, {place}: expected an object, found {type(row).__name__}")
    text = row_text(row)
    if text is not None:
        return text
    if "text" in row:
        found = "null" if row["text"] is None else f"{row['text']!r:.40}"
        raise ShortstackError(f"{file}, {place}: text is {found}, expected a string", hint="correct or remove the row")
    found = ", ".join(map(str, row)) or "nothing"
    raise ShortstackError(
        f"{file}, {place}: no {expected} (found: {found})", hint="rename the field that holds the text to text"
    )


def row_text(row: dict[str, Any]) -> str | None:
    """The text of a row, under the names that published sets give it; None where there is none."""
    if isinstance(row.get("text"), str):
        return str(row["text"])
    return row["sentence"].strip() if isinstance(row.get("sentence"), str) else None  # PTB as published
