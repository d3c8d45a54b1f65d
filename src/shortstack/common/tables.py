"""A table as figures in rows and columns: the terminal shows it as text, a report as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shortstack.common.formatting import table


@dataclass(frozen=True)
class Table:
    """Cells that are ready to be read, under their headings.

    Attributes:
        head: a heading per column; the first columns name the row.
        rows: cells, as many in each row as there are headings.
        title: a line above; "" for none.
        notes: lines below.
        keys: how many columns name the row: they come first, and again in every part of a table that is too wide.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    notes: Sequence[str] = ()
    keys: int = 1

    def to_text(self) -> str:
        """The title, aligned columns, and the notes."""
        return "\n".join([*([self.title] if self.title else []), table(self.head, self.rows, self.keys), *self.notes])
