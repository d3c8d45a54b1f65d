"""Copy tensors byte for byte, under new names and in part: checked for NaN, hashed, flushed and read back meanwhile."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import queue
import sys
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shortstack.checkpoint.headers import DTYPE_BITS, TensorInfo, read_exactly, write_header
from shortstack.checkpoint.pieces import PIECE, pieces
from shortstack.errors import ShortstackError
from shortstack.runtime.atomic_output import flush

_PIECES_IN_FLIGHT = 4
_ROW = 4096  # bytes summed up together
_SYNC_EVERY = 32 << 20  # bytes between flushes; what is flushed is read back while copying continues


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


def copy_tensors(
    copies: Sequence[TensorCopy],
    target: Path,
    *,
    header: bytes,
    allow_nonfinite: bool = False,
    progress: Callable[[int], object] = lambda _: None,
) -> str:
    """Write one safetensors file by copying bytes; return the sha256 of its bytes.

    Reading and checking, hashing, writing, and flushing and reading back run side by side. Nothing is ever held but a
    few pieces of 4 MiB.

    Args:
        copies: the tensors, in the order of their bytes.
        target: the file to make.
        header: what stands before the tensors (`new_header`).
        allow_nonfinite: copy NaN and infinity as they are.
        progress: called with the number of bytes just read.

    Raises:
        ShortstackError: a tensor holds NaN or infinity, a source file changed, or what was read back is not what was
            written.
    """
    before = {copy.source.file: _stamp(copy.source.file) for copy in copies}
    largest = max((copy.nbytes for copy in copies), default=0)
    pipeline = _CopyPipeline(target, min(PIECE, max(1, largest)))
    with pipeline, contextlib.ExitStack() as stack:
        pipeline.write(memoryview(bytearray(header)))
        descriptors = {}
        for path in before:
            descriptors[path] = os.open(path, os.O_RDONLY)
            stack.callback(os.close, descriptors[path])
        for copy in copies:
            tensor = copy.source
            for size, fill in pieces(copy):
                buffer = pipeline.buffer(size)
                fill(buffer, descriptors[tensor.file])
                if not allow_nonfinite and not _all_finite(buffer, tensor.dtype):
                    raise ShortstackError(
                        f"{tensor.file}: tensor {tensor.name!r} holds NaN or infinity",
                        hint="the checkpoint is damaged; --allow-nonfinite copies it unchanged",
                    )
                pipeline.write(buffer)
                progress(size)
    for path, stamp in before.items():
        if _stamp(path) != stamp:
            raise ShortstackError(
                f"{path}: the file changed while it was read",
                hint="run the command again when no other program writes to the file",
            )
    return pipeline.sha256.hexdigest()


def copied_bytes(copy: TensorCopy) -> Iterator[bytes]:
    """What `copy_tensors` writes for one tensor, piece by piece."""
    descriptor = os.open(copy.source.file, os.O_RDONLY)
    try:
        for size, fill in pieces(copy):
            buffer = memoryview(bytearray(size))
            fill(buffer, descriptor)
            yield bytes(buffer)
    finally:
        os.close(descriptor)


def same_bytes(first: TensorCopy, second: TensorCopy) -> bool:
    """Whether `copy_tensors` would write the same bytes for both."""
    pairs = zip(copied_bytes(first), copied_bytes(second), strict=True)
    return first.nbytes == second.nbytes and all(a == b for a, b in pairs)


def first_nonfinite(tensors: Iterable[TensorInfo], progress: Callable[[int], object] = lambda _: None) -> str | None:
    """The name of the first tensor that holds NaN or infinity, or None."""
    for tensor in tensors:
        for piece in copied_bytes(TensorCopy(tensor, tensor.name)):
            if not _all_finite(memoryview(piece), tensor.dtype):
                return tensor.name
            progress(len(piece))
    return None


def read_through(
    path: Path, tensors: Iterable[TensorInfo], progress: Callable[[int], object] = lambda _: None
) -> tuple[str, str | None]:
    """(sha256 of a safetensors file, the first of its tensors that holds NaN or infinity), in one pass over its bytes.

    Args:
        path: the file.
        tensors: all that it holds.
        progress: called with the number of bytes just read.
    """
    digest, broken = hashlib.sha256(), None
    ordered = sorted(tensors, key=lambda tensor: tensor.start)
    with path.open("rb") as stream:
        digest.update(stream.read(ordered[0].start if ordered else -1))  # the header
    for tensor in ordered:
        for piece in copied_bytes(TensorCopy(tensor, tensor.name)):
            digest.update(piece)
            if broken is None and not _all_finite(memoryview(piece), tensor.dtype):
                broken = tensor.name
            progress(len(piece))
    return digest.hexdigest(), broken


def write_hashed(path: Path, data: bytes) -> str:
    """Write a small file; return the sha256 of its bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


@dataclass
class _CopyPipeline:
    """One output file, by a thread for each step: the caller reads and checks pieces, others hash, write and read them back.

    sha256 is the slowest step by far, so that nothing else shares its thread and it is computed once, of what is sent to
    the disk. What comes back from the disk is compared, piece by piece, by a checksum that costs a tenth of that.
    """

    target: Path
    piece: int  # bytes of the largest piece: a small checkpoint needs no large buffers
    sha256: hashlib._Hash = field(default_factory=hashlib.sha256)
    failures: list[BaseException] = field(default_factory=list)

    def __enter__(self) -> _CopyPipeline:
        self._descriptor = os.open(self.target, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._sent: queue.Queue[tuple[memoryview, int] | None] = queue.Queue()
        self._hashed: queue.Queue[tuple[memoryview, int] | None] = queue.Queue()
        self._written: queue.Queue[list[tuple[int, int, int]] | None] = queue.Queue()
        self._free: queue.Queue[memoryview] = queue.Queue()
        for _ in range(_PIECES_IN_FLIGHT):
            self._free.put(memoryview(bytearray(self.piece)))
        self._threads = [
            threading.Thread(target=self._guard, args=(work, following), daemon=True)
            for work, following in (
                (self._hash_pieces, self._hashed),
                (self._write_pieces, self._written),
                (self._read_back, None),
            )
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self._sent.put(None)
        for thread in self._threads:
            thread.join()
        os.close(self._descriptor)
        if self.failures and kind is None:
            raise self.failures[0]

    def buffer(self, size: int) -> memoryview:
        """A piece of memory to fill; waits while all are on their way to disk."""
        while True:
            if self.failures:
                raise self.failures[0]
            with contextlib.suppress(queue.Empty):
                return self._free.get(timeout=0.2)[:size]

    def write(self, piece: memoryview) -> None:
        """Send a piece on its way. Its checksum is taken first, so that a later change in memory is found too."""
        self._sent.put((piece, _checksum(piece)))

    def _guard(self, work: Callable[[], None], following: queue.Queue[Any] | None) -> None:
        """Run one step; the step after it ends when this one has ended, however it did."""
        try:
            work()
        except BaseException as error:  # handed to the caller's thread, which raises it
            self.failures.append(error)
        finally:
            if following is not None:
                following.put(None)

    def _hash_pieces(self) -> None:
        while (sent := self._sent.get()) is not None:
            self.sha256.update(sent[0])
            self._hashed.put(sent)

    def _write_pieces(self) -> None:
        position = 0
        unsynced: list[tuple[int, int, int]] = []  # (start, end, checksum) of pieces
        while (hashed := self._hashed.get()) is not None:
            piece, checksum = hashed
            done = 0
            while done < len(piece):
                done += os.pwrite(self._descriptor, piece[done:], position + done)
            unsynced.append((position, position + len(piece), checksum))
            position += len(piece)
            if isinstance(piece.obj, bytearray) and len(piece.obj) == self.piece:
                self._free.put(memoryview(piece.obj))
            if position - unsynced[0][0] >= _SYNC_EVERY:
                self._written.put(unsynced)
                unsynced = []
        self._written.put(unsynced)

    def _read_back(self) -> None:
        buffer = memoryview(bytearray(self.piece))
        while (written := self._written.get()) is not None:
            flush(self._descriptor)
            if (
                sys.platform == "linux" and written
            ):  # drop the pages: the bytes come back from the disk, not from memory
                first, last = written[0][0], written[-1][1]
                os.posix_fadvise(self._descriptor, first, last - first, os.POSIX_FADV_DONTNEED)
            for start, end, checksum in written:
                if len(buffer) < end - start:  # a header larger than the pieces
                    buffer = memoryview(bytearray(end - start))
                piece = buffer[: end - start]
                read_exactly(self._descriptor, piece, start, self.target)
                if _checksum(piece) != checksum:
                    raise ShortstackError(
                        f"{self.target}: read back other bytes than were written, from byte {start} on",
                        hint="check the disk",
                    )


def new_header(copies: Sequence[TensorCopy], metadata: dict[str, str]) -> bytes:
    """The header bytes of a file that holds these copies, in this order."""
    return write_header([copy.written for copy in copies], metadata)


def values_are_known(dtype: str) -> bool:
    """Whether `first_nonfinite` looks into tensors of this type, or they can hold neither NaN nor infinity."""
    return dtype in ("F64", "F32", "BF16", "F16", "F8_E5M2", "F8_E4M3") or dtype[0] in "BIU"


def _checksum(piece: memoryview) -> int:
    """Of a piece: CRC-32 of the sums of its 64-bit words, by columns and by rows of 4 KiB, and of what is left over.

    A word that changed, words or pages that changed places, and zeros are seen; it costs two additions a word.
    """
    import numpy as np

    whole = len(piece) // _ROW * _ROW
    words = np.frombuffer(piece[:whole], dtype=np.uint64).reshape(-1, _ROW // 8)
    return zlib.crc32(piece[whole:], zlib.crc32(words.sum(axis=1), zlib.crc32(words.sum(axis=0))))


def _all_finite(buffer: memoryview, dtype: str) -> bool:
    """Whether no element has an exponent of all ones. Cheap bit tests: maxima of masked integers, no float arithmetic."""
    import numpy as np

    if dtype in ("F32", "F64"):
        values = np.frombuffer(buffer, dtype=np.float32 if dtype == "F32" else np.float64)
        # max and min pass NaN on, so two passes in cache see every NaN and every infinity.
        return bool(np.isfinite(values.max(initial=0)) and np.isfinite(values.min(initial=0)))
    if dtype in ("BF16", "F16"):
        bits = np.frombuffer(buffer, dtype=np.uint16)
        exponent = 0x7F80 if dtype == "BF16" else 0x7C00
        doubled = np.left_shift(bits, 1)  # the sign falls off the end; all exponents of ones are now the largest values
        return bool(doubled.max(initial=0) < exponent << 1)
    if dtype == "F8_E5M2":
        bits8 = np.frombuffer(buffer, dtype=np.uint8)
        return bool(np.bitwise_and(bits8, 0x7F).max(initial=0) < 0x7C)
    if dtype == "F8_E4M3":
        bits8 = np.frombuffer(buffer, dtype=np.uint8)
        return bool(np.bitwise_and(bits8, 0x7F).max(initial=0) < 0x7F)
    return True


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino
