"""The sampler: its interval, what it reads of a process, and of a GPU through the driver's library."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
import torch

from shortstack.benchmark.utilisation import (
    INTERVAL_SECONDS,
    UNITS,
    Nvml,
    Sampler,
    reader,
    rss_bytes,
    session_rss_bytes,
    summary,
)

CPU = torch.device("cpu")


def test_it_reads_until_the_body_ends() -> None:
    enough = threading.Event()
    count = iter(range(100))

    def read() -> dict[str, float]:
        number = next(count)
        if number == 3:
            enough.set()
        return {"load": float(number)}

    assert INTERVAL_SECONDS == 0.5  # as published
    with Sampler(read, interval=0.001) as sampler:
        assert enough.wait(30)
    assert [one["load"] for one in sampler.readings[:4]] == [0.0, 1.0, 2.0, 3.0]
    seconds = [one["seconds"] for one in sampler.readings]
    assert seconds == sorted(seconds)
    assert summary([{"seconds": 1, "load": 0.5}, {"seconds": 2, "load": 1.0, "power": 3.0}]) == {
        "load": (0.75, 1.0), "power": (3.0, 3.0)
    }  # fmt: skip


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="the system does not tell it")
def test_what_is_read_of_a_process() -> None:
    read = reader(CPU)
    sum(number * number for number in range(200_000))
    found = read()
    assert set(found) == {"load", "rss_bytes"} <= set(UNITS)
    assert found["load"] > 0
    assert found["rss_bytes"] > 1e7
    session = session_rss_bytes(os.getsid(0))
    assert session is not None
    assert session >= 0
    assert rss_bytes(0) is None


class FakeLibrary:
    """NVIDIA's library, as far as it is asked; `lacking` are functions that an older driver does not have."""

    lacking: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        if name in self.lacking:
            raise AttributeError(name)
        return {
            "nvmlInit_v2": lambda: 0,
            "nvmlDeviceGetUtilizationRates": self._pair(97, 41),
            "nvmlDeviceGetMemoryInfo": self._triple,
            "nvmlDeviceGetTemperature": self._value(63),
            "nvmlDeviceGetPowerUsage": self._value(310_500),
            "nvmlDeviceGetClockInfo": self._value(1410),
            "nvmlDeviceGetCurrentClocksThrottleReasons": self._value(0b100101),
            "nvmlDeviceGetComputeRunningProcesses_v3": self._processes,
        }[name]

    @staticmethod
    def _pair(one: int, two: int) -> Any:
        def fill(handle: Any, reference: Any) -> int:
            reference._obj[0], reference._obj[1] = one, two
            return 0

        return fill

    @staticmethod
    def _triple(handle: Any, reference: Any) -> int:
        reference._obj[2] = 40 << 30
        return 0

    @staticmethod
    def _value(value: int) -> Any:
        def fill(handle: Any, *arguments: Any) -> int:
            arguments[-1]._obj.value = value
            return 0

        return fill

    @staticmethod
    def _processes(handle: Any, count: Any, infos: Any) -> int:
        count._obj.value = 3
        return 7  # more than the no entries that there was room for


@pytest.mark.fault(90)
def test_what_is_read_of_a_gpu() -> None:
    """Heat, power, clocks and other processes are recorded: a figure of a shared or slowed GPU shows it."""
    found = Nvml(FakeLibrary(), None).reading()
    assert found == {
        "gpu": 0.97, "gpu_memory": 0.41, "gpu_memory_bytes": float(40 << 30), "temperature": 63.0, "power": 310.5,
        "clock": 1410.0, "throttled": 1.0, "other_processes": 2.0,
    }  # fmt: skip
    assert set(found) <= set(UNITS)


def test_what_a_driver_does_not_tell_is_left_out() -> None:
    library = FakeLibrary()
    library.lacking = ("nvmlDeviceGetPowerUsage", "nvmlDeviceGetComputeRunningProcesses_v3")
    assert not {"power", "other_processes"} & set(Nvml(library, None).reading())


def test_without_the_drivers_library_there_is_no_gpu_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    import ctypes

    def none(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", none)
    assert Nvml.of(torch.device("cuda", 0)) is None
