"""One tensor to write: which bytes of which tensor on disk, and the name that they get."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from shortstack.checkpoint.headers import DTYPE_BITS, TensorInfo


@dataclass(frozen=True)
class TensorCopy:
    """One tensor to write: where its bytes come from, and the name and shape that it gets.

    Attributes:
        source: the tensor on disk.
        name: what it is called in the new file.
        sliced: (dimension 0 or 1, runs of its indices that are kept, in order); None for all of it.
        zeros: nothing is copied: the new tensor has the source's dtype and shape, and is zero.
    """

    source: TensorInfo
    name: str
    sliced: tuple[int, tuple[tuple[int, int], ...]] | None = None
    zeros: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor that is written."""
        if self.sliced is None:
            return self.source.shape
        dim, runs = self.sliced
        length = sum(stop - start for start, stop in runs)
        return tuple(length if index == dim else size for index, size in enumerate(self.source.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor that is written."""
        return -(-DTYPE_BITS[self.source.dtype] * self.numel // 8)

    @property
    def numel(self) -> int:
        """Elements of the tensor that is written."""
        return math.prod(self.shape)

    @property
    def written(self) -> TensorInfo:
        """Dtype, shape and size of what is written, for a header."""
        return replace(self.source, name=self.name, shape=self.shape, nbytes=self.nbytes)

    def byte_runs(self) -> Iterator[tuple[int, int]]:
        """(offset from the source's start, length) of the bytes that are copied, in order."""
        if self.zeros:
            return
        if self.sliced is None:
            yield 0, self.source.nbytes
            return
        dim, runs = self.sliced
        rows = self.source.shape[0] if dim else 1
        stride = self.source.nbytes // rows
        each = stride // self.source.shape[dim]
        for row in range(rows):
            for start, stop in runs:
                yield row * stride + start * each, (stop - start) * each
