"""Rows of a source by number, over all its files: counted first, read when they are drawn. Sources of 10^8 rows fit.

Parquet files state how many rows they have. Lines are counted in one pass that parses nothing; then a file is entered near
the lines that are needed, a compressed one too: the pass keeps states of the decompressor.
"""

from __future__ import annotations

import bisect
import itertools
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol, overload

from shortstack.data.decompressed import Entries
from shortstack.data.files import TEXT_SUFFIXES, open_rows, suffix_of
from shortstack.data.json_rows import LONGEST_ROW, Budget, holds_lines, is_blank, json_lines
from shortstack.data.parquet import PARQUET_BATCH, opened_parquet, plain_row
from shortstack.data.sources import file_rows

Convert = Callable[[Path, str, Any], Any]
_MARK_EVERY = 128  # rows between places at which a file of lines is entered
# Where compressed files are entered: compressed bytes between two places, and how many there may be (some 45 kB each).
_ENTRY_SPACING, _MOST_ENTRIES = 1 << 20, 512


class CountedRows(Sequence[Any]):
    """What is made of each row, by the row's number.

    Args:
        files: in order; each is opened once now, to count its rows.
        convert: (file, place, row) -> what is made of it.
    """

    def __init__(self, files: Sequence[Path], convert: Convert) -> None:
        paths = [Path(file) for file in files]
        spacing = max(_ENTRY_SPACING, sum(path.stat().st_size for path in paths) // _MOST_ENTRIES)
        self._files = [_counted(path, spacing) for path in paths]
        self._starts = list(itertools.accumulate((file.count for file in self._files), initial=0))
        self._convert = convert
        self._held: dict[int, Any] = {}

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, number: int) -> Any: ...

    @overload
    def __getitem__(self, number: slice) -> list[Any]: ...

    def __getitem__(self, number: int | slice) -> Any:
        if isinstance(number, slice):
            numbers = range(*number.indices(len(self)))
            self.fetch(numbers)
            return [self._held[one] for one in numbers]
        if not 0 <= number < len(self):
            raise IndexError(number)
        if number not in self._held:
            self.fetch([number])
        return self._held[number]

    def holds(self, number: int) -> bool:
        """Whether a row was fetched and is still held."""
        return number in self._held

    def fetch(self, numbers: Collection[int]) -> None:
        """Read rows, those of one file in one pass; of the rows that are held, the others are let go."""
        self._held = {number: self._held[number] for number in numbers if number in self._held}
        missing = sorted(set(numbers).difference(self._held))
        for place, group in itertools.groupby(missing, lambda number: bisect.bisect_right(self._starts, number) - 1):
            file, start = self._files[place], self._starts[place]
            for number, where, row in file.rows([number - start for number in group]):
                self._held[start + number] = self._convert(file.path, where, row)

    def mapped(self, change: Callable[[Any], Any]) -> CountedRows:
        """The same rows, with something else made of them; nothing is counted again."""
        made = CountedRows([], lambda file, place, row: change(self._convert(file, place, row)))
        made._files, made._starts = self._files, self._starts
        return made


class _File(Protocol):
    path: Path
    count: int

    def rows(self, wanted: Sequence[int]) -> Iterator[tuple[int, str, Any]]:
        """(number in this file, place for errors, row) of the wanted ones, ascending."""


def _counted(path: Path, spacing: int) -> _File:
    suffix = suffix_of(path)
    if suffix == ".parquet":
        return _Parquet(path)
    if suffix.startswith(".json"):
        entries = Entries(spacing)
        with open_rows(path, entries=entries) as stream:
            if suffix.startswith(".jsonl") or holds_lines(stream):
                return _Lines(path, stream, entries)
    return _Whole(path)


class _Parquet:
    """Row groups are entered by the counts in the file's footer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with opened_parquet(path) as table:
            groups = (table.metadata.row_group(number).num_rows for number in range(table.num_row_groups))
            self._starts = array("q", itertools.accumulate(groups, initial=0))
        self.count = self._starts[-1]

    def rows(self, wanted: Sequence[int]) -> Iterator[tuple[int, str, Any]]:
        with opened_parquet(self.path) as table:
            for group, some in itertools.groupby(wanted, lambda number: bisect.bisect_right(self._starts, number) - 1):
                numbers, begin = list(some), self._starts[group]
                for batch in table.iter_batches(batch_size=PARQUET_BATCH, row_groups=[group]):
                    here = [number for number in numbers if begin <= number < begin + len(batch)]
                    for number, row in zip(here, batch.take([n - begin for n in here]).to_pylist(), strict=True):
                        yield number, f"row {number + 1}", plain_row(row)
                    begin += len(batch)
                    if begin > numbers[-1]:
                        break


class _Lines:
    """A row is a line that is not blank."""

    def __init__(self, path: Path, stream: IO[bytes], entries: Entries) -> None:
        self.path, self.count, self._entries = path, 0, entries
        self._bytes, self._lines = array("q"), array("q")  # where every 128th row begins
        at = 0
        for line in itertools.count():
            raw = stream.readline(LONGEST_ROW)
            if not raw:
                break
            if not is_blank(raw, at):
                if self.count % _MARK_EVERY == 0:
                    self._bytes.append(at)
                    self._lines.append(line)
                self.count += 1
            at += len(raw)

    def rows(self, wanted: Sequence[int]) -> Iterator[tuple[int, str, Any]]:
        with open_rows(self.path, entries=self._entries) as stream:
            for mark, some in itertools.groupby(wanted, lambda number: number // _MARK_EVERY):
                numbers, start = set(some), self._bytes[mark]
                stream.seek(start)
                lines = json_lines(self.path, stream, Budget(None), start=start, number=self._lines[mark] + 1)
                for number, (place, row, _) in enumerate(lines, start=mark * _MARK_EVERY):
                    if number in numbers:
                        yield number, place, row
                    if number >= max(numbers):
                        break


class _Whole:
    """A text file is one row, read when it is drawn; a JSON list is read at once, because it cannot be entered."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._is_text = suffix_of(path) in TEXT_SUFFIXES
        self._listed = [] if self._is_text else list(file_rows(path))
        self.count = 1 if self._is_text else len(self._listed)

    def rows(self, wanted: Sequence[int]) -> Iterator[tuple[int, str, Any]]:
        from shortstack.data.sources import text_of

        for number in wanted:
            place, row = ("", {"text": text_of(self.path, Budget(None))}) if self._is_text else self._listed[number]
            yield number, place, row
