"""Rows of JSON, line by line or as one list, checked as they are read: strict UTF-8, no duplicate keys, whole characters."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from shortstack.common.json_text import json_text
from shortstack.data.decompressed import kind_by_content
from shortstack.errors import ShortstackError

LONGEST_ROW = 64 << 20  # bytes of one line
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # escaped: half a character, or one of a pair


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


def not_a_list(file: Path, found: Any) -> ShortstackError:
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


def whole_characters(file: Path, place: str, row: Any, text: str) -> Any:
    """A row without half characters: JSON may hold them, text may not, and no tokenizer takes them."""
    if _SURROGATE.search(text):
        try:
            json_text(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise ShortstackError(
                f"{file}, {place}: a lone surrogate ({half}), which is not valid text",
                hint="correct or remove the row",
            ) from None
    return row


def holds_lines(stream: IO[bytes]) -> bool:
    """Whether a .json file is one of lines, as the hub's c4 is: two rows side by side are no JSON text."""
    first, second = stream.readline(LONGEST_ROW).strip(), stream.readline(LONGEST_ROW).strip()
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
        raw = stream.readline(LONGEST_ROW)
        if not raw:
            return
        if len(raw) == LONGEST_ROW:
            raise ShortstackError(
                f"{file}, line {line_number}: longer than {LONGEST_ROW >> 20} MiB",
                hint="if it is plain text, rename it to .txt",
            )
        is_row, line = not is_blank(raw, start), decoded(file, budget.take(raw), start).strip()
        start += len(raw)
        if is_row:
            place = f"line {line_number}"
            yield place, whole_characters(file, place, parsed(file, place, line), line), start
        if budget.left == 0:
            budget.is_cut = bool(stream.read(1))
            return


def is_blank(line: bytes, start: int) -> bool:
    """Whether a line is no row: of white space alone, Unicode's too; a byte order mark before it where the file starts.

    Args:
        line: its bytes; what is not UTF-8 is not blank, and refused when it is read.
        start: where in the file it begins.
    """
    if line.startswith(b"{"):  # nearly every line; those that are counted need not be decoded
        return False
    text = line.removeprefix(_BYTE_ORDER_MARK) if start == 0 else line
    return not text.decode("utf-8", errors="replace").strip()


def decoded(file: Path, data: bytes, start: int, *, cut: bool = False) -> str:
    """Strict UTF-8, with or without a byte order mark at the start of the file.

    Args:
        start: where in the file the data begins, for errors.
        cut: the data may end inside a character.
    """
    if start == 0:
        data = data.removeprefix(_BYTE_ORDER_MARK)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if cut and len(data) - error.start < 4 and error.reason == "unexpected end of data":
            return data[: error.start].decode("utf-8")
        if start == 0 and (known := kind_by_content(data, packed=True)):
            raise ShortstackError(f"{file}: is {known[0]}, not text", hint=known[1]) from None
        is_utf_16 = start == 0 and data[:2] in (b"\xff\xfe", b"\xfe\xff")
        hint = "is it UTF-16? iconv -f UTF-16 -t UTF-8" if is_utf_16 else "convert the file to UTF-8"
        raise ShortstackError(f"{file}: not UTF-8 at byte {start + error.start}", hint=hint) from None


def parsed(file: Path, place: str, text: str) -> Any:
    """What JSON text holds; errors name the file and the place in it."""
    if text.startswith("\0"):
        raise ShortstackError(
            f"{file}, {place or 'its start'}: NUL bytes, not JSON", hint="the file may be incomplete: download it again"
        )
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        where = f", {place}" if place else ""
        raise ShortstackError(
            f"{file}{where}: not valid JSON: {error}", hint="correct the file, or leave it out"
        ) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {next(key for key in keys if keys.count(key) > 1)}")
    return found
