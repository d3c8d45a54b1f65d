"""Rows of .parquet files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.common.json_text import json_text
from shortstack.errors import ShortstackError, UsageError, first_line

if TYPE_CHECKING:
    from shortstack.data.json_rows import Budget

PARQUET_BATCH = 1024  # rows that are decoded together


def _without_nulls(value: Any) -> Any:
    """What lies inside a row without the entries that are null: parquet adds them where another row has such a key."""
    if isinstance(value, dict):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value


def plain_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row as a file of JSON would have it."""
    return {key: _without_nulls(value) for key, value in row.items()}


@contextlib.contextmanager
def opened_parquet(file: Path) -> Iterator[Any]:
    """Within, a .parquet file is open.

    Raises:
        ShortstackError: it is no such file, or its text is not UTF-8.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise UsageError(f"{file}: reading parquet needs pyarrow", hint="pip install 'shortstack[parquet]'") from None
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            yield table
    except UnicodeDecodeError:
        raise ShortstackError(f"{file}: a row is not UTF-8", hint="convert its text to UTF-8") from None
    except pyarrow.ArrowException as error:
        raise ShortstackError(f"{file}: not a parquet file ({first_line(error)})", hint="download it again") from None


def parquet_rows(file: Path, budget: Budget | None) -> Iterator[tuple[str, Any]]:
    """(place, row) of each row of a .parquet file, until the budget is spent.

    Raises:
        ShortstackError: it is no such file, or its text is not UTF-8.
    """
    number = 0
    with opened_parquet(file) as table:
        for batch in table.iter_batches(batch_size=PARQUET_BATCH):
            try:
                rows = batch.to_pylist()
            except UnicodeDecodeError:
                raise ShortstackError(
                    f"{file}, row {number + 1}: not UTF-8", hint="convert its text to UTF-8"
                ) from None
            for row in rows:
                number += 1
                if budget is not None:
                    budget.take(json_text(row, default=str, sort_keys=True).encode())
                yield f"row {number}", plain_row(row)
            if budget is not None and budget.left == 0:
                budget.is_cut = number < table.metadata.num_rows
                return
