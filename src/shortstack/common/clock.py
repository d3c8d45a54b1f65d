"""The wall-clock time of the command that runs now: everything from its call on, loading and imports included."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextvars import ContextVar

_began: ContextVar[float] = ContextVar("_began")


@contextlib.contextmanager
def timed() -> Iterator[None]:
    """Within, a stage runs: its time begins now. Stages that it calls have times of their own."""
    token = _began.set(time.perf_counter())
    try:
        yield
    finally:
        _began.reset(token)


def command_seconds() -> float:
    """Since the stage that runs now was called."""
    return time.perf_counter() - _began.get()
