"""Stored tensors read by position into memory that is used again and again: bounded, and nothing waits for page faults.

Through the page cache every byte takes a fresh page and a copy, in processor time that the computing cores lack. What would
not stay there until it is read again can be read past it (direct I/O), unless it is there already.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from shortstack.checkpoint.headers import TensorInfo, read_exactly
from shortstack.errors import ShortstackError

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def from_bytes(raw: torch.Tensor, tensor: TensorInfo) -> torch.Tensor:
    """The tensor that these bytes hold; nothing is copied.

    Args:
        raw: `tensor.nbytes` of uint8, beginning where its dtype may (`begins_well`).
        tensor: what the file's header says of it.

    Raises:
        ShortstackError: it is stored in a precision that torch does not have.
    """
    if tensor.dtype not in _DTYPES:
        raise ShortstackError(
            f"{tensor.file}: {tensor.name} is stored as {tensor.dtype}, which is no type to compute in"
        )
    return raw.view(_DTYPES[tensor.dtype]).view(tensor.shape)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, as they lie in memory; nothing is copied."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def begins_well(tensor: TensorInfo) -> bool:
    """Whether it lies in its file where torch can have it as it is: at a multiple of its numbers' size."""
    return tensor.dtype in _DTYPES and tensor.start % _DTYPES[tensor.dtype].itemsize == 0


_PAGE = 4096  # bytes; direct I/O begins and ends at multiples of this, in files and in memory
_DIRECT: int = getattr(os, "O_DIRECT", 0)  # Linux alone has both
_NO_WAIT: int = getattr(os, "RWF_NOWAIT", 0)
_PROBES = 4  # pages of a span that are looked for in the page cache


class OpenFiles:
    """Open files, read by position.

    Args:
        past_cache: read what the page cache does not hold without bringing it there, where the system can do that.
    """

    def __init__(self, *, past_cache: bool = False) -> None:
        self._descriptors: dict[Path, int] = {}
        self._direct: dict[Path, int | None] = {}
        self._past_cache = past_cache and bool(_DIRECT and _NO_WAIT)
        self._random = random.Random()

    def spans(self, tensors: Sequence[TensorInfo]) -> list[Span]:
        """How they are read: one by one, or, past the cache, as many as lie together."""
        found: list[Span] = []
        for tensor in sorted(tensors, key=lambda tensor: (str(tensor.file), tensor.start, tensor.nbytes)):
            last = found[-1] if found else None
            in_place = self._past_cache and begins_well(tensor)
            if in_place and last is not None and last.in_place and (last.file, last.end) == (tensor.file, tensor.start):
                last.tensors.append(tensor)
            else:
                found.append(Span([tensor], in_place))
        return found

    def buffer_bytes(self, tensors: Sequence[TensorInfo]) -> int:
        """Bytes of a buffer that holds these tensors at once."""
        return sum(span.pages for span in self.spans(tensors))

    def read(self, span: Span, pages: memoryview) -> None:
        """Fill memory, which begins at a page and is `span.pages` long, with a span."""
        if span.file not in self._descriptors:
            self._descriptors[span.file] = os.open(span.file, os.O_RDONLY)
        descriptor, reached = self._descriptors[span.file], span.begin
        if span.in_place and not self._is_cached(descriptor, span):
            reached = self._read_past_cache(span, pages)
        if reached < span.end:
            into = pages[span.offset + reached - span.begin : span.offset + span.end - span.begin]
            read_exactly(descriptor, into, reached, span.file)

    def close(self) -> None:
        """Let the files go."""
        for descriptor in (*self._descriptors.values(), *self._direct.values()):
            if descriptor is not None:
                os.close(descriptor)
        self._descriptors.clear()
        self._direct.clear()

    def _is_cached(self, descriptor: int, span: Span) -> bool:
        """Whether a few pages anywhere in it are in the page cache; True where that cannot be told."""
        for _ in range(_PROBES):
            place = self._random.randrange(span.begin, max(span.end, span.begin + 1))
            try:
                os.preadv(descriptor, [bytearray(1)], place, _NO_WAIT)
            except BlockingIOError:
                return False
            except OSError:
                return True
        return True

    def _read_past_cache(self, span: Span, pages: memoryview) -> int:
        """How far it came: to the end, or to where the file ends or cannot be read so. What is left is read as usual."""
        first = at = span.begin - span.offset
        descriptor = self._direct_descriptor(span.file)
        if descriptor is None:
            return span.begin
        while at < span.end:
            try:
                count = os.preadv(descriptor, [pages[at - first :]], at)  # all at once: many calls cost more
            except OSError:  # not possible here after all, or the disk is faulty, as the read that follows will say
                os.close(descriptor)
                self._direct[span.file] = None
                break
            at += count
            if count == 0 or count % _PAGE:
                break
        return min(max(at, span.begin), span.end)

    def _direct_descriptor(self, file: Path) -> int | None:
        if file not in self._direct:
            self._direct[file] = None
            with contextlib.suppress(OSError):  # a file system that has no direct I/O
                self._direct[file] = os.open(file, os.O_RDONLY | _DIRECT)
        return self._direct[file]


@dataclass(frozen=True)
class Span:
    """Tensors that lie one behind the other in a file.

    Attributes:
        tensors: in their order.
        in_place: read as whole pages, so that they come to lie in memory as they lie in the file. Else a span is one tensor,
            which begins at a page wherever it is stored: products may differ in their last bits with where a weight begins.
    """

    tensors: list[TensorInfo]
    in_place: bool

    @property
    def file(self) -> Path:
        """Where they are."""
        return self.tensors[0].file

    @property
    def begin(self) -> int:
        """Where the first one begins in the file."""
        return self.tensors[0].start

    @property
    def end(self) -> int:
        """Where the last one ends."""
        return self.tensors[-1].start + self.tensors[-1].nbytes

    @property
    def offset(self) -> int:
        """Bytes between the beginning of the memory that it is read into and its own."""
        return self.begin % _PAGE if self.in_place else 0

    @property
    def pages(self) -> int:
        """Bytes of memory that it takes: whole pages."""
        return -(-(self.offset + self.end - self.begin) // _PAGE) * _PAGE


class Buffer:
    """Memory for the raw bytes of one block, used again for the next; its pages are only taken when first written."""

    def __init__(self, nbytes: int, *, pinned: bool = False) -> None:
        self._bytes = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True) if pinned else _whole_pages(nbytes)

    def fill(self, tensors: Sequence[TensorInfo], files: OpenFiles) -> dict[str, torch.Tensor]:
        """Read tensors; return views of them by name."""
        views = {}
        position = 0
        memory = memoryview(self._bytes.numpy())  # type: ignore[arg-type]
        for span in files.spans(tensors):
            files.read(span, memory[position : position + span.pages])
            for tensor in span.tensors:
                start = position + span.offset + tensor.start - span.begin
                views[tensor.name] = from_bytes(self._bytes[start : start + tensor.nbytes], tensor)
            position += span.pages
        return views


def _whole_pages(nbytes: int) -> torch.Tensor:
    try:
        memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # no memory, which torch says in the words that are looked for (`is_out_of_memory`)
        return torch.empty(nbytes, dtype=torch.uint8)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # products go through all of it, and find a huge page's address sooner
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
