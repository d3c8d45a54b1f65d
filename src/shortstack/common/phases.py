"""Where time goes: phases that are timed while somebody looks (`--verbose`), and cost nothing otherwise."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator


class Phases:
    """Seconds by phase; what a phase within a phase takes counts as the inner one's alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner: list[float] = []  # of each open phase, what those within it have taken

    @contextlib.contextmanager
    def within(self, what: str) -> Iterator[None]:
        """Time what is done within."""
        self.seconds.setdefault(what, 0.0)
        self._inner.append(0.0)
        start = time.perf_counter()
        try:
            yield
        finally:
            taken = time.perf_counter() - start
            self.seconds[what] += taken - self._inner.pop()
            if self._inner:
                self._inner[-1] += taken


_watched: Phases | None = None


@contextlib.contextmanager
def watched() -> Iterator[Phases]:
    """Within, phases of this thread are timed, and libraries are not silenced."""
    global _watched
    before, _watched = _watched, Phases()
    try:
        yield _watched
    finally:
        _watched = before


def is_watched() -> bool:
    """Whether somebody looks: then libraries are not silenced."""
    return _watched is not None


@contextlib.contextmanager
def phase(what: str) -> Iterator[None]:
    """What is done within is `what`, for who looks."""
    if _watched is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    with _watched.within(what):
        yield
