"""What the machine does meanwhile: load and memory of a CPU, and of an NVIDIA GPU what its driver (NVML) counts."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

INTERVAL_SECONDS = 0.5  # as published
Reading = dict[str, float]
# Name of a reading -> its unit.
UNITS = {
    "load": "share", "rss_bytes": "bytes", "gpu": "share", "gpu_memory": "share", "gpu_memory_bytes": "bytes",
    "temperature": "degrees Celsius", "power": "W", "clock": "MHz", "throttled": "share", "other_processes": "processes",
}  # fmt: skip


class Sampler:
    """Within, a thread reads every so often; `readings` holds what it read, each with its `seconds` since the begin."""

    def __init__(self, read: Callable[[], Reading], interval: float = INTERVAL_SECONDS) -> None:
        self._read, self._interval = read, interval
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._begun = 0.0
        self.readings: list[Reading] = []

    def __enter__(self) -> Sampler:
        self._begun = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _loop(self) -> None:
        while not self._ended.wait(self._interval):
            self.readings.append({"seconds": time.perf_counter() - self._begun, **self._read()})


def reader(device: torch.device) -> Callable[[], Reading]:
    """What is read of this process, and of the GPU that it computes on."""
    own = _OwnLoad()
    gpu = Nvml.of(device) if device.type == "cuda" else None
    return own if gpu is None else lambda: {**own(), **gpu.reading()}


class _OwnLoad:
    """Load of this process in cores since the last reading, over the cores that it may use; and its memory."""

    def __init__(self) -> None:
        self._cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._before = self._now()

    def __call__(self) -> Reading:
        (wall, busy), before = self._now(), self._before
        self._before = wall, busy
        elapsed = max(wall - before[0], 1e-9)
        found: Reading = {"load": (busy - before[1]) / elapsed / self._cores}
        rss = rss_bytes(os.getpid())
        return found if rss is None else {**found, "rss_bytes": float(rss)}

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()


def rss_bytes(pid: int) -> int | None:
    """Memory that a process holds now; None where the system does not tell it (macOS)."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None


def session_rss_bytes(leader: int) -> int | None:
    """Memory of a process and all that it started, where it leads a session of its own; None where that is not told."""
    if not Path("/proc/self/stat").is_file():
        return None
    total = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == leader:
                    total += rss_bytes(int(entry.name)) or 0
    return total


class Nvml:
    """One GPU, through the library that comes with NVIDIA's driver; what it does not tell is left out."""

    _library: Any = None

    def __init__(self, library: Any, handle: Any) -> None:
        self._nvml, self._handle = library, handle

    @classmethod
    def of(cls, device: torch.device) -> Nvml | None:
        """The GPU that torch calls by this name; None where the driver's library does not know it."""
        import torch

        library = cls._opened()
        if library is None:
            return None
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
        handle = ctypes.c_void_p()
        if library.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(handle)):
            return None
        return cls(library, handle)

    @classmethod
    def _opened(cls) -> Any:
        if cls._library is None:
            with contextlib.suppress(OSError, AttributeError):
                library = ctypes.CDLL("libnvidia-ml.so.1")
                if library.nvmlInit_v2() == 0:
                    cls._library = library
        return cls._library

    def reading(self) -> Reading:
        """Everything that it tells now."""
        found: Reading = {}
        used = (ctypes.c_uint * 2)()
        if self._ask("nvmlDeviceGetUtilizationRates", ctypes.byref(used)):
            found |= {"gpu": used[0] / 100, "gpu_memory": used[1] / 100}
        memory = (ctypes.c_ulonglong * 3)()  # total, free, used
        if self._ask("nvmlDeviceGetMemoryInfo", ctypes.byref(memory)):
            found["gpu_memory_bytes"] = float(memory[2])
        for name, function, before, scale in (
            ("temperature", "nvmlDeviceGetTemperature", (ctypes.c_uint(0),), 1.0),
            ("power", "nvmlDeviceGetPowerUsage", (), 1e-3),
            ("clock", "nvmlDeviceGetClockInfo", (ctypes.c_uint(1),), 1.0),  # of the multiprocessors
        ):
            value = ctypes.c_uint()
            if self._ask(function, *before, ctypes.byref(value)):
                found[name] = value.value * scale
        return found | self._disturbed()

    def _disturbed(self) -> Reading:
        """Whether it is slowed down by heat or power, and how many other processes compute on it."""
        found: Reading = {}
        reasons = ctypes.c_ulonglong()
        if self._ask("nvmlDeviceGetCurrentClocksThrottleReasons", ctypes.byref(reasons)):
            found["throttled"] = float(bool(reasons.value & ~0b11))  # idle, and clocks that a user has set, are none
        count = ctypes.c_uint(0)
        code = self._code("nvmlDeviceGetComputeRunningProcesses_v3", ctypes.byref(count), None)
        if code in (0, 7):  # 7: the list is longer than no entries, which tells how long it is
            found["other_processes"] = float(max(0, count.value - 1))
        return found

    def _ask(self, function: str, *arguments: Any) -> bool:
        return self._code(function, *arguments) == 0

    def _code(self, function: str, *arguments: Any) -> int:
        try:
            return int(getattr(self._nvml, function)(self._handle, *arguments))
        except AttributeError:  # an older driver
            return -1


def summary(readings: list[Reading]) -> dict[str, tuple[float, float]]:
    """Name -> (mean, largest) of all readings."""
    names = dict.fromkeys(name for reading in readings for name in reading if name != "seconds")
    found = {}
    for name in names:
        values = [reading[name] for reading in readings if name in reading]
        found[name] = (sum(values) / len(values), max(values))
    return found
