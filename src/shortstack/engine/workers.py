"""Threads that run batches side by side on a CPU, each with its share of the cores.

Within one product all cores wait for the slowest at every step; batches on cores of their own never do.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import torch

from shortstack.engine.cpu import inherited
from shortstack.runtime.cgroups import processors

Item = TypeVar("Item")
Result = TypeVar("Result")


class SideBySide(Protocol):
    """Like `map`, as a list."""

    def __call__(self, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """What `work` makes of each item, in their order."""


USUAL_COUNT = 4  # each holds the activations of a batch
_LARGEST_COUNT = 13


def usable_threads() -> int:
    """How many threads compute: torch's number, but no more than the processors that this process may use.

    torch looks at the affinity, not at a container's share of processor time; a number that the user set stands.
    """
    threads = torch.get_num_threads()
    return threads if "OMP_NUM_THREADS" in os.environ else min(threads, processors())


def worker_count(device: torch.device) -> int:
    """How many batches are run side by side: each by the same number of threads, and no thread is left over."""
    if device.type != "cpu":
        return 1
    threads = usable_threads()
    even = (count for count in range(2, _LARGEST_COUNT + 1) if threads % count == 0)
    return min(even, key=lambda count: (abs(count - USUAL_COUNT), count), default=1)


@contextlib.contextmanager
def workers(device: torch.device) -> Iterator[SideBySide]:
    """Gives a function like `map` that does its work, without gradients, in several threads where that is faster."""
    count, threads, before = worker_count(device), usable_threads(), torch.get_num_threads()
    if count == 1:
        yield lambda work, items: [work(item) for item in items]
        return
    enter = inherited()

    def begin() -> None:
        torch.set_num_threads(threads // count)  # of this thread; torch gives the number to those that start later, too
        torch.set_grad_enabled(False)
        enter()

    pool = ThreadPoolExecutor(count, thread_name_prefix="shortstack-batch", initializer=begin)
    try:
        yield lambda work, items: list(pool.map(work, items))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)
