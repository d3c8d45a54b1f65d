"""Rows of .parquet files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.common.json_text import json_text
from shortstack.errors import ShortstackError, UsageError, first_line

if TYPE_CHECKING:
    from shortstack.data.sources import Budget


def _without_nulls(value: Any) -> Any:
    """What lies inside a row without the entries that are null: parquet adds them where another row has such a key."""
    if isinstance(value, dict):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value


def parquet_rows(file: Path, budget: Budget | None) -> Iterator[tuple[str, Any]]:
    """(place, row) of each row of a .parquet file, until the budget is spent.

    Raises:
        ShortstackError: it is no such file, or its text is not UTF-8.
    """
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
                    yield f"row {number}", {key: _without_nulls(value) for key, value in row.items()}
                if budget is not None and budget.left == 0:
                    budget.is_cut = number < table.metadata.num_rows
                    return
    except UnicodeDecodeError:
        raise ShortstackError(f"{file}, row {number + 1}: not UTF-8", hint="convert its text to UTF-8") from None
    except pyarrow.ArrowException as error:
        raise ShortstackError(f"{file}: not a parquet file ({first_line(error)})", hint="download it again") from None
