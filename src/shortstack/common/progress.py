"""Progress bars on stderr, or silence."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from shortstack.common.phases import phase


@dataclass(frozen=True)
class Progress:
    """Where long work says how far it is."""

    quiet: bool = False
    _told: set[str] | None = field(default=None, repr=False, compare=False)  # lines not to repeat; None repeats any

    def without_repeats(self) -> Progress:
        """The same, which says each line once: for work that runs the same step several times."""
        return replace(self, _told=set())

    @contextlib.contextmanager
    def bar(self, what: str, total: int | None, unit: str = "it") -> Iterator[Callable[[int], object]]:
        """A bar named `what`; call what it gives with how much was just done. Silent where stderr is not a terminal."""
        with phase(what):
            if self.quiet or not on_a_terminal():
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
        if self.quiet or (self._told is not None and line in self._told):
            return
        if self._told is not None:
            self._told.add(line)
        say(line)


_silent = False


@contextlib.contextmanager
def silent(is_silent: bool) -> Iterator[None]:
    """Within, if `is_silent`, no bar is shown, whoever makes it: what `--quiet` means to the whole process."""
    global _silent
    before, _silent = _silent, is_silent
    try:
        yield
    finally:
        _silent = before


def on_a_terminal() -> bool:
    """Whether somebody sees how progress moves on stderr."""
    return not _silent and sys.stderr is not None and sys.stderr.isatty()


def say(line: str) -> None:
    """One line on stderr. Where it is closed or full the line is lost, and not the work; nothing goes to stdout instead."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)
