"""Where texts come from: the embedded text, files (.txt .jsonl .json .parquet), folders of them, sets on the hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortstack.common.progress import Progress
from shortstack.data.chats import Chat, chat_of, is_chat
from shortstack.data.files import SUFFIXES, TEXT_SUFFIXES, Role, open_rows, readable, source_files, suffix_of
from shortstack.data.json_rows import Budget, decoded, holds_lines, json_lines, not_a_list, parsed, whole_characters
from shortstack.errors import ShortstackError


@dataclass(frozen=True)
class Corpus:
    """Texts, or windows of token ids that are used unchanged, or chats for a template.

    Attributes:
        source: what the user called it.
        sha256: of the bytes that were read.
        documents: the texts (a text file is one).
        windows: token ids, where the rows hold `input_ids`.
        chats: for a template, where the rows hold `messages` or `conversations`.
        instructions: (place, row), where rows of instruction and output were requested.
        written: (token ids, which of them count), of text that a model wrote.
        detail: what else figures should name (the Python version, for the embedded text).
    """

    source: str
    sha256: str
    documents: Sequence[str] = ()
    windows: Sequence[list[int]] = ()
    chats: Sequence[Chat] = ()
    instructions: Sequence[tuple[str, dict[str, Any]]] = ()
    written: Sequence[tuple[list[int], list[bool]]] = ()
    detail: str = ""

    @property
    def rows(self) -> int:
        """Number of documents, windows or chats."""
        return sum(map(len, (self.documents, self.windows, self.chats, self.instructions, self.written)))

    def described(self) -> dict[str, Any]:
        """What a record says about the texts."""
        described: dict[str, Any] = {"source": self.source, "sha256": self.sha256, "rows": self.rows}
        return {**described, "detail": self.detail} if self.detail else described


def read_corpus(
    source: str,
    *,
    role: Role,
    limit_bytes: int | None = None,
    counted_beyond: int | None = None,
    answered: bool = False,
    progress: Progress | None = None,
) -> Corpus:
    """Read all rows of a SOURCE: `embedded`, a file, or a folder of files.

    Args:
        source: `embedded`, or the path of a .txt .raw .tokens .text (one document each), .jsonl or .json (rows with
            `text`, `input_ids` or `messages`) or .parquet file, or of a folder of such files, read in name order; of a
            folder with splits, those that go with the role.
        role: which part of the embedded text: the one that the model was trained on, or the held-out one.
        limit_bytes: read about this much and no more, however large the files are; the record says so.
        counted_beyond: of files that are larger than this together, rows are counted, and read when they are indexed.
        answered: rows of instruction and output, under one of their names, are taken, too.
        progress: reports which files and how many rows were read, and what was skipped.

    Raises:
        ShortstackError: nothing there, not UTF-8, a broken row, or no usable text.
    """
    if source == "embedded":
        return _embedded(role)
    files = source_files(source, role=role, progress=progress)
    if counted_beyond is not None and sum(_size(Path(file)) for file in files) > counted_beyond:
        return _counted_corpus(source, files, answered, progress)
    budget = Budget(limit_bytes)
    found: dict[str, list[Any]] = {"documents": [], "windows": [], "chats": [], "instructions": []}
    for file in files:
        with readable(file):
            _read_file(Path(file), found, budget, answered)
    detail = f"the first {budget.read} bytes" if budget.is_cut else ""
    corpus = Corpus(source, budget.digest.hexdigest(), **found, detail=detail)
    kinds = [kind for kind, rows in found.items() if rows]
    if kinds in ([], ["documents"]) and not any(text.strip() for text in corpus.documents):
        raise ShortstackError(f"{source}: no usable text (empty or blank)", hint="give a source with text")
    if len(kinds) > 1:
        raise _mixed(source)
    if progress is not None:
        progress.say(_summary(corpus, budget))
    return corpus


def _counted_corpus(source: str, files: Sequence[Path], answered: bool, progress: Progress | None) -> Corpus:
    """Rows that are counted now, and read when they are indexed: one at a time, or those that are fetched together."""
    from shortstack.data.counted_rows import CountedRows

    kinds: set[str] = set()

    def convert(file: Path, place: str, row: Any) -> Any:
        kind, value = _converted(file, place, row, answered)
        kinds.add(kind)
        if len(kinds) > 1:
            raise _mixed(source)
        return value

    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{Path(file).name} {_size(Path(file))}\n".encode())
    with readable(source):
        rows = CountedRows(files, convert)
        if not rows:
            raise ShortstackError(f"{source}: no usable text (empty or blank)", hint="give a source with text")
        _ = rows[0]  # says of which kind they are
    kind, number = min(kinds), len(files)
    detail = f"{len(rows)} rows counted in {number} {'file' if number == 1 else 'files'}; sha256 is of names and sizes"
    if progress is not None:
        progress.say(f"{source}: {detail.partition(';')[0]}; only those that are drawn are read")
    return Corpus(source, digest.hexdigest(), **{kind: rows}, detail=detail)


def _mixed(source: str) -> ShortstackError:
    return ShortstackError(
        f"{source}: mixes rows of text, input_ids, messages and instructions", hint="keep one kind per source"
    )


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _summary(corpus: Corpus, budget: Budget) -> str:
    """What was read, on one line."""
    blank = sum(not text.strip() for text in corpus.documents)
    kind = "windows" if corpus.windows else "chats" if corpus.chats else "documents"
    kind = "instructions" if corpus.instructions else kind
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


def _read_file(file: Path, found: dict[str, list[Any]], budget: Budget, answered: bool) -> None:
    budget.files += budget.left != 0
    if suffix_of(file) not in TEXT_SUFFIXES:
        for place, row in file_rows(file, budget):
            kind, value = _converted(file, place, row, answered)
            found[kind].append(value)
    elif budget.left == 0:
        budget.is_cut = True
    else:
        found["documents"].append(text_of(file, budget))


def text_of(file: Path, budget: Budget) -> str:
    """A text file, as far as the budget goes."""
    with file.open("rb") as stream:
        data = budget.take(stream.read(budget.left))
        more = bool(stream.read(1))
        budget.is_cut |= more
        return decoded(file, data, 0, cut=more).replace("\r\n", "\n")


def file_rows(file: Path, budget: Budget | None = None) -> Iterator[tuple[str, Any]]:
    """(place, row) of each row of a .jsonl, .json or .parquet file, one at a time, until the budget is spent.

    Raises:
        ShortstackError: not such a file, not UTF-8, or a broken row.
    """
    suffix = suffix_of(file)
    if suffix not in SUFFIXES or suffix in TEXT_SUFFIXES:
        raise ShortstackError(f"{file}: unknown file type", hint=f"expected one ending in {' '.join(SUFFIXES)}")
    if budget is not None and budget.left == 0:
        budget.is_cut = True
    elif suffix == ".parquet":
        from shortstack.data.parquet import parquet_rows

        yield from parquet_rows(file, budget)
    else:
        budget = budget or Budget(None)
        with readable(file), open_rows(file) as stream:
            if suffix.startswith(".jsonl") or holds_lines(stream):
                for place, row, _ in json_lines(file, stream, budget):
                    yield place, row
                return
            text = decoded(file, budget.take(stream.read()), 0)
            rows = parsed(file, "", text)
            if not isinstance(rows, list):
                raise not_a_list(file, rows)
            for number, row in enumerate(rows, start=1):
                yield f"row {number}", whole_characters(file, f"row {number}", row, text)


def _converted(file: Path, place: str, row: Any, answered: bool) -> tuple[str, Any]:
    """(which of a corpus's lists a row belongs to, what is made of it)."""
    if isinstance(row, dict) and isinstance(row.get("input_ids"), list):
        ids = row["input_ids"]
        if not all(type(token) is int and token >= 0 for token in ids):
            raise ShortstackError(f"{file}, {place}: input_ids must be whole numbers >= 0")
        return "windows", ids
    if isinstance(row, dict) and is_chat(row):
        return "chats", chat_of(f"{file}, {place}", row)
    if answered and isinstance(row, dict) and row_text(row) is None:
        from shortstack.data.instructions import is_instruction

        if is_instruction(row):
            return "instructions", (f"{file}, {place}", row)
    expected = "text, input_ids, messages, or instruction and output" if answered else "text, input_ids or messages"
    return "documents", required_text(file, place, row, expected=expected)


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
