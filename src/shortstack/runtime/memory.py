"""What memory the machine offers and what was used of it: free and installed bytes, peaks, the allocator."""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.runtime import cgroups

if TYPE_CHECKING:
    import torch


def peak_rss_bytes() -> int:
    """The most memory that this process held so far, or since `used` began to measure."""
    with contextlib.suppress(OSError):  # Linux; what getrusage says there begins with what the parent process held
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass
class Usage:
    """What a piece of work took.

    Attributes:
        seconds: wall-clock.
        peak_rss_bytes: the most memory that the process held meanwhile.
        peak_device_bytes: the most that was allocated on the CUDA device; None without one.
    """

    seconds: float = 0.0
    peak_rss_bytes: int = 0
    peak_device_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return dict(self.__dict__)


@contextlib.contextmanager
def used(device: torch.device | None = None) -> Iterator[Usage]:
    """Measure what the body takes; the record is filled in when it ends."""
    on_cuda = device is not None and device.type == "cuda"
    with contextlib.suppress(OSError):  # Linux: the peak is reset; elsewhere it is that of the process so far
        Path("/proc/self/clear_refs").write_text("5")
    if on_cuda:
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    usage, started = Usage(), time.perf_counter()
    yield usage
    usage.seconds, usage.peak_rss_bytes = time.perf_counter() - started, peak_rss_bytes()
    if on_cuda:
        usage.peak_device_bytes = int(torch.cuda.max_memory_allocated(device))


def return_free_memory() -> None:
    """Give memory that was freed back to the system, where the allocator (glibc's) would keep it in fragments.

    Activations of a sweep differ in size from call to call; kept fragments add up to more than the weights.
    """
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


@functools.cache
def libc() -> Any:
    """The C library of this process; None where it cannot be loaded."""
    import ctypes

    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):
        return None


def _glibc() -> Any:
    library = libc()
    return library if hasattr(library, "malloc_trim") else None


def available_bytes(device: torch.device | None = None) -> int:
    """Memory that can be taken now, on the host or on a CUDA device; a container's limit counts."""
    if device is not None and device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    free, left = _free_on_machine(), cgroups.memory_left()
    return free if left is None else min(free, left)


def installed_bytes() -> int:
    """The memory of the machine, or of the container where that has less, whatever of it is free."""
    installed, limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), cgroups.memory_limit()
    return installed if limit is None else min(installed, limit)


def _free_on_machine() -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return installed_bytes() // 2


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch found no memory, on a GPU or on the host."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
