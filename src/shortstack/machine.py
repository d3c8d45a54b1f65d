"""What the machine offers and what was used of it: devices, memory, precision."""

from __future__ import annotations

import functools
import os
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from shortstack.errors import ShortstackError, UsageError, first_line

if TYPE_CHECKING:
    import torch

DType = Literal["auto", "float32", "bfloat16", "float16", "float64"]


def peak_rss_bytes() -> int:
    """The most memory that this process held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def return_free_memory() -> None:
    """Give memory that was freed back to the system, where the allocator (glibc's) would keep it in fragments.

    Activations of a sweep differ in size from call to call; kept fragments add up to more than the weights.
    """
    library = _libc()
    if library is not None:
        library.malloc_trim(0)


@functools.cache
def _libc() -> Any:
    import ctypes

    try:
        library = ctypes.CDLL(None)
        return library if hasattr(library, "malloc_trim") else None
    except (OSError, TypeError):
        return None


def available_bytes(device: torch.device | None = None) -> int:
    """Memory that can be taken now, on the host or on a CUDA device."""
    if device is not None and device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU.

    Raises:
        ShortstackError: no such device here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ShortstackError(f"--device {name}: not usable here ({first_line(error)})", hint="--device cpu") from None
    return device


def pick_dtype(name: str, stored: str, device: torch.device) -> torch.dtype:
    """What to compute in: `auto` is float32 on a CPU and the checkpoint's own precision elsewhere.

    Args:
        name: auto, float32, bfloat16, float16 or float64.
        stored: the checkpoint's dtype as safetensors names it, such as BF16.
        device: where to compute.
    """
    import torch

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if name == "auto":
        own = {"BF16": torch.bfloat16, "F16": torch.float16}.get(stored, torch.float32)
        return torch.float32 if device.type == "cpu" else own
    if name not in dtypes:
        raise UsageError(f"--dtype {name}: unknown", hint=f"known: auto, {', '.join(dtypes)}")
    return dtypes[name]
