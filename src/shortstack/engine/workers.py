"""Threads that run batches side by side on a CPU, each with its share of the cores.

Within one product all cores wait for the slowest at every step; batches on cores of their own never do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import torch

from shortstack.engine.cpu import inherited

Item = TypeVar("Item")
Result = TypeVar("Result")


class SideBySide(Protocol):
    """Like `map`, as a list."""

    def __call__(self, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """What `work` makes of each item, in their order."""


_MOST = 4  # each holds the activations of a batch


def worker_count(device: torch.device) -> int:
    """How many batches are run side by side."""
    return min(_MOST, torch.get_num_threads()) if device.type == "cpu" else 1


@contextlib.contextmanager
def workers(device: torch.device) -> Iterator[SideBySide]:
    """Gives a function like `map` that does its work, without gradients, in several threads where that is faster."""
    count, threads = worker_count(device), torch.get_num_threads()
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
        torch.set_num_threads(threads)
