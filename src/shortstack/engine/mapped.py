"""Stored tensors as the pages of the file that hold them: nothing is copied, and no processor waits for the disk.

Pages are brought in before they are used, by the thread that reads ahead. Where a system cannot do that, or a file is not
laid out for it, tensors are read by position instead (`weights.py`). So are weights that are streamed: pages from the disk
made a large run slower (docs/experiments.md).
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from shortstack.checkpoint.headers import TensorInfo
from shortstack.engine.bus_error import unwatch, watch
from shortstack.engine.stored import begins_well, from_bytes

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
