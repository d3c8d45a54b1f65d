"""Rows of token ids in a few flat arrays: five bytes a token, where lists of Python integers take forty and more.

Legend: N tokens of all rows, R rows.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

import numpy as np

from shortstack.data.answers import IGNORED


@dataclass(frozen=True)
class Example:
    """One row as token ids.

    Attributes:
        ids: the tokens, prompt and response.
        labels: the same, with `IGNORED` for tokens that are not predicted.
    """

    ids: list[int]
    labels: list[int]


@dataclass(frozen=True, eq=False)
class ExampleRows(Sequence[Example]):
    """Examples, one behind the other; one that is taken out of them is two lists.

    Attributes:
        ids: the tokens of all rows, int32 [N].
        is_label: whether the loss counts each of them, if it can: the first token of a row is never predicted. bool [N]
        ends: where each row ends, int64.
        numbers: which of them these are, in their order, int64 [R].
    """

    ids: np.ndarray = field(repr=False)
    is_label: np.ndarray = field(repr=False)
    ends: np.ndarray = field(repr=False)
    numbers: np.ndarray = field(repr=False)

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> ExampleRows: ...
    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return replace(self, numbers=self.numbers[place])
        number = self.numbers[place]
        tokens = slice(self.ends[number - 1] if number else 0, self.ends[number])
        ids = self.ids[tokens]
        return Example(ids.tolist(), np.where(self.is_label[tokens], ids, IGNORED).tolist())

    def chosen(self, places: Iterable[int]) -> ExampleRows:
        """Some of them, in this order; no token is copied."""
        return replace(self, numbers=self.numbers[np.fromiter(places, dtype=np.int64)])

    @property
    def lengths(self) -> array[int]:
        """Tokens of each row."""
        return array("i", np.diff(self.ends, prepend=0)[self.numbers].astype(np.int32).tobytes())

    @property
    def predicted(self) -> int:
        """Tokens that the loss counts."""
        firsts = np.concatenate([[0], self.ends[:-1]])[self.numbers]
        counted = np.add.reduceat(self.is_label, np.concatenate([[0], self.ends[:-1]]), dtype=np.int64)[self.numbers]
        return int(counted.sum() - self.is_label[firsts].sum())


class RowsInMaking:
    """Rows that are read one after another."""

    def __init__(self) -> None:
        self._ids, self._is_label, self._ends = array("i"), bytearray(), array("q")

    def __len__(self) -> int:
        return len(self._ends)

    def append(self, ids: Sequence[int], labels: Sequence[int]) -> None:
        """One more row, of at least one token."""
        self._ids.extend(ids)
        self._is_label.extend(label != IGNORED for label in labels)
        self._ends.append(len(self._ids))

    def finished(self) -> ExampleRows:
        """All of them; nothing is appended after this."""
        return ExampleRows(
            np.frombuffer(self._ids, dtype=np.int32),
            np.frombuffer(self._is_label, dtype=bool),
            np.frombuffer(self._ends, dtype=np.int64),
            np.arange(len(self), dtype=np.int64),
        )
