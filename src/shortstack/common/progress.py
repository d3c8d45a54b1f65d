"""Progress bars on stderr, or silence."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Where long work says how far it is."""

    quiet: bool = False

    @contextlib.contextmanager
    def bar(self, what: str, total: int, unit: str = "it") -> Iterator[Callable[[int], object]]:
        """A bar named `what`; call what it gives with how much was just done. Silent where stderr is not a terminal."""
        if self.quiet or sys.stderr is None or not sys.stderr.isatty():
            yield lambda _: None
            return
        from tqdm import tqdm

        scaled = unit == "B"
        with tqdm(
            total=total, desc=what, unit=unit, unit_scale=scaled, leave=False, file=sys.stderr, disable=False
        ) as shown:
            yield shown.update

    def say(self, line: str) -> None:
        """One line on stderr."""
        if not self.quiet:
            say(line)


def say(line: str) -> None:
    """One line on stderr. Where it is closed or full the line is lost, and not the work; nothing goes to stdout instead."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)
