"""Where texts come from: the embedded text, files (.txt .jsonl .json .parquet) and folders of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from shortstack.errors import ShortstackError, UsageError

TEXT_SUFFIXES = (".txt", ".raw", ".tokens", ".text")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".json", ".parquet")
NAMED_SETS = ("wikitext2", "ptb", "c4", "bookcorpus", "alpaca-cleaned")

Role = Literal["calibration", "evaluation"]


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


def read_corpus(source: str, *, role: Role) -> Corpus:
    """Read all rows of a SOURCE: `embedded`, a file, or a folder of files.

    Args:
        source: `embedded`, or the path of a .txt .raw .tokens .text (one document each), .jsonl or .json (rows with
            `text`, `input_ids` or `messages`) or .parquet file, or of a folder of such files, read in name order.
        role: which part of the embedded text: what the model was trained on, or what was held out.

    Raises:
        ShortstackError: nothing there, not UTF-8, a broken row, or no usable text.
    """
    if source == "embedded":
        return _embedded(role)
    path = Path(source).expanduser()
    if not path.exists():
        hint = "give a file, a folder, or embedded"
        if source in NAMED_SETS:
            hint = f"the hub's {source} cannot be fetched by name yet: give a local copy of it"
        raise ShortstackError(f"{source}: no such file or folder", hint=hint)
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
        if not files:
            raise ShortstackError(
                f"{source}: no text in this folder", hint=f"expected files ending in {' '.join(SUFFIXES)}"
            )
    digest = hashlib.sha256()
    corpus = Corpus(source, "")
    for file in files:
        try:
            raw = file.read_bytes()
        except OSError as error:
            raise ShortstackError(f"{file}: cannot be read ({(error.strerror or str(error)).lower()})") from None
        digest.update(raw)
        _read_file(file, raw, corpus)
    corpus = Corpus(source, digest.hexdigest(), corpus.documents, corpus.windows, corpus.chats)
    if not corpus.windows and not corpus.chats and not any(text.strip() for text in corpus.documents):
        raise ShortstackError(f"{source}: no usable text (empty or blank)", hint="give a source that holds text")
    if sum(map(bool, (corpus.documents, corpus.windows, corpus.chats))) > 1:
        raise ShortstackError(f"{source}: mixes rows of text, input_ids and messages", hint="keep one kind per source")
    return corpus


def _embedded(role: Role) -> Corpus:
    from shortstack import embedded

    chosen = embedded.heldout_documents() if role == "evaluation" else embedded.training_documents()
    texts = [document.text for document in chosen]
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    part = "held-out part" if role == "evaluation" else "training part"
    return Corpus(
        "embedded", digest, texts, detail=f"{part} of the docstrings and help topics of {embedded.python_name()}"
    )


def _read_file(file: Path, raw: bytes, corpus: Corpus) -> None:
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        _add_rows(file, _parquet_rows(file), corpus)
        return
    if suffix not in SUFFIXES:
        raise ShortstackError(f"{file}: unknown kind of file", hint=f"expected one ending in {' '.join(SUFFIXES)}")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ShortstackError(f"{file}: not UTF-8 at byte {error.start}", hint="convert the file to UTF-8") from None
    if suffix in TEXT_SUFFIXES:
        corpus.documents.append(text.replace("\r\n", "\n"))
    elif suffix == ".jsonl":
        rows = ((f"line {n}", line) for n, line in enumerate(text.split("\n"), start=1) if line.strip())
        _add_rows(file, ((place, _parse(file, place, line)) for place, line in rows), corpus)
    else:
        rows_found = _parse(file, "", text)
        if not isinstance(rows_found, list):
            raise ShortstackError(f"{file}: expected a JSON list of rows, found {type(rows_found).__name__}")
        _add_rows(file, ((f"row {n}", row) for n, row in enumerate(rows_found, start=1)), corpus)


def _parse(file: Path, place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        where = f", {place}" if place else ""
        raise ShortstackError(f"{file}{where}: not valid JSON: {error}", hint="correct or remove it") from None


def _parquet_rows(file: Path) -> Iterable[tuple[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UsageError(f"{file}: reading parquet needs pyarrow", hint="pip install pyarrow") from None
    try:
        rows = pyarrow.parquet.read_table(file).to_pylist()
    except pyarrow.ArrowException as error:
        raise ShortstackError(f"{file}: not a parquet file ({str(error).splitlines()[0]})") from None
    return [(f"row {n}", row) for n, row in enumerate(rows, start=1)]


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
        elif isinstance(row.get("text"), str):
            corpus.documents.append(row["text"])
        else:
            found = ", ".join(map(str, row)) or "nothing"
            raise ShortstackError(f"{file}, {place}: no text, input_ids or messages (found: {found})")
