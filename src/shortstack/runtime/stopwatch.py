"""Times of calls on a device: medians of a few runs, after those that only warm up."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

_WARMUP, _RUNS = 2, 9


def now(device: torch.device) -> float:
    """Seconds, once what was given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def median_seconds(run: Callable[[], object], device: torch.device) -> float:
    """What a call takes."""
    found = []
    for _ in range(_WARMUP + _RUNS):
        begun = now(device)
        run()
        found.append(now(device) - begun)
    return statistics.median(found[_WARMUP:])


def medians_of_runs(run: Callable[[], list[float]]) -> list[float]:
    """The medians of each of the times that a call gives."""
    runs = [run() for _ in range(_WARMUP + _RUNS)][_WARMUP:]
    return [statistics.median(times) for times in zip(*runs, strict=True)]
