"""A tensor that is copied, in pieces that fit in a small buffer: runs of bytes, or rows of which some columns are kept."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from shortstack.checkpoint.headers import TensorInfo, read_exactly

if TYPE_CHECKING:
    import numpy as np

    from shortstack.checkpoint.byte_copy import TensorCopy

PIECE = 4 << 20  # bytes read, checked, hashed and written at a time
_ZEROS = -1  # in place of an offset: bytes that no tensor holds

Fill = Callable[[memoryview, int], None]  # (what to fill, the file's descriptor)


def pieces(copy: TensorCopy) -> Iterator[tuple[int, Fill]]:
    """A copy in pieces of at most 4 MiB: (bytes, what reads them)."""
    if _has_kept_columns(copy):
        yield from _column_pieces(copy)
        return
    for runs in _run_groups(copy):
        yield sum(length for _, length in runs), functools.partial(_fill, tensor=copy.source, runs=runs)


def _has_kept_columns(copy: TensorCopy) -> bool:
    """Whether rows are read whole and their kept columns picked: a read for each run of columns would take far longer."""
    if copy.zeros or copy.sliced is None or copy.sliced[0] != 1:
        return False
    rows, columns = copy.source.shape[:2]
    row_nbytes = copy.source.nbytes // max(1, rows)
    return columns > 0 and columns <= row_nbytes <= PIECE and row_nbytes % columns == 0 and copy.nbytes > 0


def _column_pieces(copy: TensorCopy) -> Iterator[tuple[int, Fill]]:
    import numpy as np

    assert copy.sliced is not None
    columns = np.concatenate([np.arange(start, stop) for start, stop in copy.sliced[1]])
    rows = copy.source.shape[0]
    at_a_time = PIECE // (copy.source.nbytes // rows)
    for first in range(0, rows, at_a_time):
        last = min(rows, first + at_a_time)
        yield (
            copy.nbytes // rows * (last - first),
            functools.partial(_fill_columns, tensor=copy.source, rows=(first, last), columns=columns),
        )


def _fill_columns(
    buffer: memoryview, descriptor: int, *, tensor: TensorInfo, rows: tuple[int, int], columns: np.ndarray
) -> None:
    import numpy as np

    row_nbytes = tensor.nbytes // tensor.shape[0]
    whole = np.empty((rows[1] - rows[0], tensor.shape[1], row_nbytes // tensor.shape[1]), dtype=np.uint8)
    read_exactly(descriptor, whole.data.cast("B"), tensor.start + rows[0] * row_nbytes, tensor.file)
    kept = np.frombuffer(buffer, dtype=np.uint8).reshape(len(whole), len(columns), -1)
    np.take(whole, columns, axis=1, out=kept, mode="clip")  # every column is there; "raise" would copy the result


def _run_groups(copy: TensorCopy) -> Iterator[list[tuple[int, int]]]:
    """The byte runs of a copy in groups of at most 4 MiB, long ones cut."""
    group: list[tuple[int, int]] = []
    room = PIECE
    for start, length in [(_ZEROS, copy.nbytes)] if copy.zeros else copy.byte_runs():
        done = 0
        while done < length:
            size = min(room, length - done)
            group.append((start if copy.zeros else start + done, size))
            done, room = done + size, room - size
            if not room:
                yield group
                group, room = [], PIECE
    if group:
        yield group


def _fill(buffer: memoryview, descriptor: int, *, tensor: TensorInfo, runs: Sequence[tuple[int, int]]) -> None:
    position = 0
    for start, length in runs:
        part = buffer[position : position + length]
        if start == _ZEROS:
            part[:] = bytes(length)
        else:
            read_exactly(descriptor, part, tensor.start + start, tensor.file)
        position += length
