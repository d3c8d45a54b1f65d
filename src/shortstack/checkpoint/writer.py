"""Publish a directory whole or not at all, and copy tensors byte for byte: hashed, checked, read back.

Protocol: refuse outputs that would harm the input, lock beside the output, write into a staging folder on the same
file system, flush, read back and compare hashes, rename, flush the parent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import os
import queue
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shortstack.checkpoint import provenance
from shortstack.checkpoint.safetensors_header import TensorInfo, read_exactly, write_header
from shortstack.errors import ShortstackError

_PIECE = 4 << 20  # bytes read, checked, hashed and written at a time
_PIECES_IN_FLIGHT = 6
_SYNC_EVERY = 64 << 20  # bytes between flushes; what is flushed is read back while copying goes on
_SPARE_SPACE = 1.05


@contextlib.contextmanager
def published(
    output: str | Path, *, inputs: Sequence[Path] = (), nbytes: int = 0, force: bool = False
) -> Iterator[Path]:
    """Give a staging directory that becomes `output` when the body ends well, and vanishes when it does not.

    Args:
        output: the directory to make.
        inputs: directories that must not be touched: `output` may be none of them, nor lie inside one.
        nbytes: what will be written, to fail before the work rather than after it.
        force: replace an existing `output`, if shortstack made it.

    Raises:
        ShortstackError: the output may not be written there, or another process is writing it.
    """
    import filelock

    target = Path(os.path.abspath(Path(output).expanduser()))
    _refuse_unsafe(target, inputs, force)
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(target.parent / f".{target.name}.shortstack.lock", timeout=0)
    try:
        with lock:
            try:
                yield from _staged(target, nbytes, force)
            finally:
                Path(lock.lock_file).unlink(missing_ok=True)
    except filelock.Timeout:
        raise ShortstackError(
            f"{target}: another shortstack process is writing it", hint="wait for it to end"
        ) from None
    except PermissionError as error:
        raise ShortstackError(f"{error.filename or target}: no permission to write there") from None


def _staged(target: Path, nbytes: int, force: bool) -> Iterator[Path]:
    _remove_stale(target)
    _check_space(target.parent, nbytes)
    stage = target.parent / f".{target.name}.shortstack-stage-{os.getpid()}"
    stage.mkdir()
    try:
        yield stage
        _sync_tree(stage)
        if target.exists():
            _refuse_unsafe(target, (), force)  # it may have appeared meanwhile
            old = target.parent / f"{stage.name}-old"
            target.rename(old)
            stage.rename(target)
            shutil.rmtree(old)
        else:
            stage.rename(target)
        _sync_directory(target.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            reason = os.strerror(error.errno).lower()
            raise ShortstackError(f"{target}: could not be written ({reason}); nothing was left there") from None
        raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def write_file(path: Path, data: bytes) -> None:
    """Write one file whole or not at all, beside its final place first. Parents are made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.shortstack-stage-{os.getpid()}")
        try:
            with temporary.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ShortstackError(f"{path}: could not be written ({(error.strerror or str(error)).lower()})") from None


def check_writable_file(path: Path) -> None:
    """Fail now rather than after the work when a file could not be written."""
    if path.is_dir():
        raise ShortstackError(f"{path}: is a directory, expected the name of a file to write")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ShortstackError(f"{path}: cannot be written there ({parent} is not a writable directory)")


@dataclass(frozen=True)
class TensorCopy:
    """One tensor to copy, and the name it gets."""

    source: TensorInfo
    name: str


def copy_tensors(
    copies: Sequence[TensorCopy],
    target: Path,
    *,
    header: bytes,
    allow_nonfinite: bool = False,
    progress: Callable[[int], object] = lambda _: None,
) -> str:
    """Write one safetensors file by copying bytes; return the sha256 of its bytes.

    Reading, checking and hashing, writing, and flushing and reading back run side by side. Nothing is ever held but a
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
    pipeline = _CopyPipeline(target)
    with pipeline, contextlib.ExitStack() as stack:
        pipeline.write(memoryview(bytearray(header)))
        descriptors = {}
        for path in before:
            descriptors[path] = os.open(path, os.O_RDONLY)
            stack.callback(os.close, descriptors[path])
        for copy in copies:
            tensor = copy.source
            for offset in range(0, tensor.nbytes, _PIECE):
                size = min(_PIECE, tensor.nbytes - offset)
                buffer = pipeline.buffer(size)
                read_exactly(descriptors[tensor.file], buffer, tensor.start + offset, tensor.file)
                if not allow_nonfinite and not _all_finite(buffer, tensor.dtype):
                    raise ShortstackError(
                        f"{tensor.file}: tensor {tensor.name!r} holds NaN or infinity",
                        hint="the checkpoint is damaged; --allow-nonfinite copies it all the same",
                    )
                pipeline.write(buffer)
                progress(size)
    for path, stamp in before.items():
        if _stamp(path) != stamp:
            raise ShortstackError(f"{path}: was changed while it was read", hint="run again when nothing writes to it")
    return pipeline.digest()


def copy_file(source: Path, target: Path) -> str:
    """Copy a small file; return the sha256 of its bytes."""
    data = source.read_bytes()
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


@dataclass
class _CopyPipeline:
    """One output file: the caller reads, checks and hashes pieces, a thread writes them, another reads them back."""

    target: Path
    written: hashlib._Hash = field(default_factory=hashlib.sha256)
    read_back: hashlib._Hash = field(default_factory=hashlib.sha256)
    failures: list[BaseException] = field(default_factory=list)

    def __enter__(self) -> _CopyPipeline:
        self._descriptor = os.open(self.target, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._pieces: queue.Queue[memoryview | None] = queue.Queue()
        self._flushed: queue.Queue[tuple[int, int] | None] = queue.Queue()
        self._free: queue.Queue[memoryview] = queue.Queue()
        for _ in range(_PIECES_IN_FLIGHT):
            self._free.put(memoryview(bytearray(_PIECE)))
        self._threads = [
            threading.Thread(target=self._guard, args=(self._write_pieces,), daemon=True),
            threading.Thread(target=self._guard, args=(self._read_back,), daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self._pieces.put(None)
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
        """Send a piece on its way. Hashing is the most work, so that it is done here and not by the thread that writes."""
        self.written.update(piece)
        self._pieces.put(piece)

    def digest(self) -> str:
        """sha256 of the file, after the pipeline has been left."""
        if self.written.digest() != self.read_back.digest():
            raise ShortstackError(f"{self.target}: what was read back is not what was written", hint="check the disk")
        return self.written.hexdigest()

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # handed to the caller's thread, which raises it
            self.failures.append(error)
            self._flushed.put(None)

    def _write_pieces(self) -> None:
        position = flushed = 0
        while (piece := self._pieces.get()) is not None:
            done = 0
            while done < len(piece):
                done += os.pwrite(self._descriptor, piece[done:], position + done)
            position += len(piece)
            if isinstance(piece.obj, bytearray) and len(piece.obj) == _PIECE:
                self._free.put(memoryview(piece.obj))
            if position - flushed >= _SYNC_EVERY:
                self._flushed.put((flushed, position))
                flushed = position
        self._flushed.put((flushed, position))
        self._flushed.put(None)

    def _read_back(self) -> None:
        buffer = memoryview(bytearray(_PIECE))
        while (part := self._flushed.get()) is not None:
            os.fdatasync(self._descriptor)
            start, end = part
            # Drop the pages, so that the bytes come back from the disk and not from memory.
            os.posix_fadvise(self._descriptor, start, end - start, os.POSIX_FADV_DONTNEED)
            for offset in range(start, end, _PIECE):
                piece = buffer[: min(_PIECE, end - offset)]
                read_exactly(self._descriptor, piece, offset, self.target)
                self.read_back.update(piece)


def new_header(copies: Sequence[TensorCopy], metadata: dict[str, str]) -> bytes:
    """The header bytes of a file that holds these copies, in this order."""
    return write_header([dataclasses.replace(copy.source, name=copy.name) for copy in copies], metadata)


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


def _refuse_unsafe(target: Path, inputs: Sequence[Path], force: bool) -> None:
    real = Path(os.path.realpath(target))
    for source in inputs:
        real_source = Path(os.path.realpath(source))
        if real == real_source or real_source in real.parents:
            where = "is the input" if real == real_source else f"lies inside the input {source}"
            raise ShortstackError(f"{target}: {where}, which is never touched", hint="choose another --out")
    if "snapshots" in real.parts and any(part.startswith("models--") for part in real.parts):
        raise ShortstackError(f"{target}: lies in a hub cache", hint="choose another --out")
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise ShortstackError(f"{target}: exists and is not a directory", hint="choose another --out")
    if not any(target.iterdir()):
        target.rmdir()
        return
    if not force:
        raise ShortstackError(f"{target}: exists already", hint="choose another --out, or --force to replace it")
    if not (target / provenance.FILE_NAME).is_file():
        raise ShortstackError(
            f"{target}: exists and was not made by shortstack (no {provenance.FILE_NAME}); --force leaves it alone",
            hint="choose another --out, or remove it yourself",
        )


def _remove_stale(target: Path) -> None:
    pattern = re.compile(rf"\.{re.escape(target.name)}\.shortstack-stage-(\d+)(-old)?")
    for path in target.parent.iterdir():
        match = pattern.fullmatch(path.name)
        if match and not _alive(int(match.group(1))):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # a stage of this number is a leftover: this process holds the lock and has not made one yet
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _check_space(folder: Path, nbytes: int) -> None:
    free = shutil.disk_usage(folder).free
    needed = int(nbytes * _SPARE_SPACE)
    if needed > free:
        raise ShortstackError(
            f"{folder}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free", hint="make room first"
        )


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        elif path.is_dir():
            _sync_directory(path)
    _sync_directory(folder)


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
