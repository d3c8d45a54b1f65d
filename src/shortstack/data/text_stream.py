"""Texts, one piece after the other, from any place on: plain files, rows of files, or documents in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shortstack.common.progress import Progress
from shortstack.data.files import TEXT_SUFFIXES, open_rows, source_files, suffix_of
from shortstack.data.json_rows import Budget, decoded, json_lines
from shortstack.data.sources import file_rows, required_text
from shortstack.errors import ShortstackError, system_reason

_EDGE = 1 << 16  # bytes at both ends of a file that its hash is made of

# Where reading resumes: (file, byte or row in it, number of the line there, part of that row).
Place = tuple[int, int, int, int]
START: Place = (0, 0, 1, 0)


@dataclass(frozen=True)
class TextSource:
    """Texts, one piece after the other, from any place on.

    Attributes:
        source: what the user called them.
        sha256: over the names, sizes and ends of the files.
        files: where they are read from, or
        documents: the texts themselves (the embedded ones).
        nbytes: of all local files; None where some are still on the hub.
    """

    source: str
    sha256: str
    files: Sequence[Path]
    documents: Sequence[str] = field(default=(), repr=False)
    nbytes: int | None = None

    def described(self) -> dict[str, Any]:
        """What a record says about the texts."""
        return {"source": self.source, "sha256": self.sha256, "rows": len(self.documents) or len(self.files)}

    def pieces(self, characters: int, start: Place = START) -> Iterator[tuple[Place, str, bool]]:
        """(where reading resumes after it, text, whether a document ends with it) of each piece that is not blank."""
        read = self._from_documents if self.documents else self._from_files
        for place, text, ends in read(characters, start):
            if text.strip():
                yield place, text, ends

    def where(self, after: Place) -> str:
        """The place of the text that `pieces` gave with `after`: file and row, for errors."""
        file, offset, line, part = after
        if self.documents:
            return f"{self.source}, document {file + (part > 0)}"
        if (offset, part) == (0, 0):  # a text file ends here
            return f"{self.files[file - 1]}, at its end"
        name = suffix_of(Path(self.files[file]))
        if name in TEXT_SUFFIXES:
            return f"{self.files[file]}, before byte {offset}"
        number = line if name.startswith(".jsonl") else offset + 1
        return f"{self.files[file]}, {'line' if name.startswith('.jsonl') else 'row'} {number if part else number - 1}"

    def _from_documents(self, characters: int, start: Place) -> Iterator[tuple[Place, str, bool]]:
        for number in range(start[0], len(self.documents)):
            yield from _parts(self.documents[number], characters, start, (number, 0, 1), (number + 1, 0, 1))

    def _from_files(self, characters: int, start: Place) -> Iterator[tuple[Place, str, bool]]:
        for number in range(start[0], len(self.files)):
            file = Path(self.files[number])
            here = start if number == start[0] else (number, 0, 1, 0)
            try:
                if suffix_of(file) in TEXT_SUFFIXES:
                    yield from _text_pieces(file, characters, here)
                else:
                    yield from _row_pieces(file, characters, here)
            except OSError as error:
                raise ShortstackError(f"{file}: cannot be read ({system_reason(error)})") from None


def open_texts(source: str, *, progress: Progress | None = None) -> TextSource:
    """A SOURCE of text: `embedded`, a file, a folder, or a set on the hub.

    Args:
        source: which.
        progress: reports which files of a folder or set are read, and which are skipped.

    Raises:
        ShortstackError: nothing there.
    """
    if source == "embedded":
        from shortstack.data.sources import read_corpus

        corpus = read_corpus(source, role="training")
        size = sum(len(document.encode()) for document in corpus.documents)
        return TextSource(source, corpus.sha256, [], corpus.documents, size)
    files = source_files(source, role="training", progress=progress)
    digest = hashlib.sha256()
    if not isinstance(files, list):  # on the hub: the names are all there is so far
        for name in files.names:  # type: ignore[attr-defined]
            digest.update(name.encode() + b"\0")
        return TextSource(source, digest.hexdigest(), files)
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_EDGE))
            stream.seek(max(0, size - _EDGE))
            digest.update(stream.read(_EDGE))
    return TextSource(source, digest.hexdigest(), files, nbytes=sum(file.stat().st_size for file in files))


def _parts(
    text: str, characters: int, start: Place, row: tuple[int, int, int], after: tuple[int, int, int]
) -> Iterator[tuple[Place, str, bool]]:
    """A row's text in pieces; those before `start` are skipped."""
    cuts = cut_text(text, characters)
    first = start[3] if row[:2] == start[:2] else 0
    for part, piece in enumerate(cuts):
        if part >= first:
            ends = part == len(cuts) - 1
            yield ((*after, 0) if ends else (*row, part + 1)), piece, ends


def cut_text(text: str, characters: int) -> list[str]:
    """A text in pieces of about so many characters, cut where a line ends, else where a word does."""
    pieces = []
    begin = 0
    while len(text) - begin > 1.5 * characters:
        limit = begin + characters
        cut = max(text.rfind("\n", begin + characters // 2, limit), 0) or text.rfind(" ", begin + 1, limit)
        cut = limit if cut <= begin else cut
        pieces.append(text[begin:cut])
        begin = cut
    return [*pieces, text[begin:]]


def _text_pieces(file: Path, characters: int, start: Place) -> Iterator[tuple[Place, str, bool]]:
    """A text file is one document, read a piece at a time, however large."""
    number, offset, line, _ = start
    size = file.stat().st_size
    with file.open("rb") as stream:
        stream.seek(offset)
        while offset < size:
            taken = stream.read(2 * characters)
            if offset + len(taken) < size:
                cut = taken.rfind(b"\n", characters // 2) + 1 or taken.rfind(b" ") + 1
                # No line and no word ends here: cut before a character, not inside one.
                while not cut and (taken[-1] & 0xC0) == 0x80:
                    taken = taken[:-1]
                taken = taken[:cut] if cut else taken[:-1]
            text = decoded(file, taken, offset).replace("\r\n", "\n")
            offset += len(taken)
            stream.seek(offset)
            ends = offset >= size
            yield ((number + 1, 0, 1, 0) if ends else (number, offset, line, 0)), text, ends


def _row_pieces(file: Path, characters: int, start: Place) -> Iterator[tuple[Place, str, bool]]:
    number, offset, line, _ = start
    if suffix_of(file).startswith(".jsonl"):
        with open_rows(file, offset) as stream:
            for place, row, after in json_lines(file, stream, Budget(None), start=offset, number=line):
                line = int(place.rpartition(" ")[2])
                text = required_text(file, place, row)
                yield from _parts(text, characters, start, (number, offset, line), (number, after, line + 1))
                offset = after
        return
    for row_number, (place, row) in enumerate(file_rows(file)):
        if row_number >= offset:
            text = required_text(file, place, row)
            yield from _parts(text, characters, start, (number, row_number, 1), (number, row_number + 1, 1))
