"""Stored tensors as the pages of the file that hold them: nothing is copied, and no processor waits for the disk.

Pages are brought in before they are used, by the thread that reads ahead. Where a system cannot do that, or a file is not
laid out for it, tensors are read by position instead (`block_weights.py`). So are weights that are streamed: pages from the
disk made a large run slower (docs/experiments.md).

A file that shrinks under a run takes its pages away, and whoever touches one is sent SIGBUS, which ends a process without a
word. No Python handler can run, because the thread never gets past the access; a C handler can, and the one here is Python
behind a C function. The access is one of torch's, which holds neither the interpreter nor the allocator: that is why it may
run at all.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from shortstack.checkpoint.headers import TensorInfo
from shortstack.engine.storage import begins_well, from_bytes
from shortstack.runtime.memory import libc

_lock = threading.Lock()
_sizes: dict[Path, int] = {}
_uses: Counter[Path] = Counter()
_before = ctypes.create_string_buffer(1024)  # a `struct sigaction`, whatever it looks like here


def watch(path: Path, size: int) -> None:
    """From now on an access to a page that this file of `size` bytes no longer has ends the process with an error.

    Raises:
        OSError: there is no C library to ask, and nothing is watched.
    """
    with _lock:
        if not _uses:
            library = libc()
            if library is None:
                raise OSError("no C library")
            library.sigaction(signal.SIGBUS, None, _before)
            library.signal(signal.SIGBUS, _handler)
        _uses[path] += 1
        _sizes[path] = size


def unwatch(path: Path) -> None:
    """The file is used no longer; after the last one, what was there before handles the signal again."""
    with _lock:
        _uses[path] -= 1
        if not _uses[path]:
            del _uses[path], _sizes[path]
        if not _uses:
            libc().sigaction(signal.SIGBUS, _before, None)


def _message() -> str:
    for path, size in _sizes.items():
        found = path.stat().st_size if path.exists() else 0
        if found < size:
            return (
                f"error: {path}: has {found} of its {size} bytes; it was changed while it was read\n"
                "hint: download the checkpoint again, then run the same command"
            )
    return (
        f"error: {', '.join(map(str, _sizes))}: cannot be read any more (SIGBUS: the disk or the mount failed?)\n"
        "hint: check the disk and the mount (dmesg), or use --memory streamed, then run the same command"
    )


def _end(_: int) -> None:
    os.write(2, f"\n{_message()}\n".encode(errors="replace"))
    os._exit(1)  # nothing that was computed from the pages can be trusted, so nothing is written


_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(_end)


_POPULATE_READ = 22  # MADV_POPULATE_READ, Linux 5.14; Python has no name for it


class MappedFiles:
    """Maps the files that are asked for, privately: what is written to a tensor never reaches its file."""

    def __init__(self) -> None:
        self._maps: dict[Path, tuple[mmap.mmap, torch.Tensor]] = {}
        self._possible = sys.platform == "linux"

    def views(self, tensors: Sequence[TensorInfo]) -> dict[str, torch.Tensor] | None:
        """Tensors by name, their pages in memory; None where they must be read."""
        found = {}
        for tensor in tensors:
            if not self._possible or not begins_well(tensor) or not self._bring(tensor):
                return None
            raw = self._maps[tensor.file][1][tensor.start : tensor.start + tensor.nbytes]
            found[tensor.name] = from_bytes(raw, tensor)
        return found

    def release(self, tensors: Sequence[TensorInfo]) -> None:
        """Let the pages go; a tensor that is used none the less gets them anew."""
        for tensor in tensors:
            if tensor.file in self._maps and tensor.nbytes:
                self._maps[tensor.file][0].madvise(mmap.MADV_DONTNEED, *_pages(tensor))

    def close(self) -> None:
        """Forget the files; their memory goes with the last tensor."""
        for path in self._maps:
            unwatch(path)
        self._maps.clear()

    def _bring(self, tensor: TensorInfo) -> bool:
        """False where pages cannot be brought in: an old kernel, or a file that is too short, as reading it will say."""
        try:
            if tensor.file not in self._maps:
                opened = _mapped(tensor.file)
                watch(tensor.file, len(opened[0]))
                self._maps[tensor.file] = opened  # only what is watched: `close` ends that
            mapped, _ = self._maps[tensor.file]
            self._possible = tensor.start + tensor.nbytes <= len(mapped)
            if tensor.nbytes and self._possible:
                mapped.madvise(_POPULATE_READ, *_pages(tensor))
        except (OSError, ValueError):
            self._possible = False
        return self._possible


def _mapped(path: Path) -> tuple[mmap.mmap, torch.Tensor]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        found = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    finally:
        os.close(descriptor)
    return found, torch.frombuffer(found, dtype=torch.uint8)


def _pages(tensor: TensorInfo) -> tuple[int, int]:
    """(where the tensor's first page begins, bytes to its end)."""
    begin = tensor.start // mmap.PAGESIZE * mmap.PAGESIZE
    return begin, tensor.start + tensor.nbytes - begin
