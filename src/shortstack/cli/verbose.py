"""What `--verbose` shows on stderr: where time went, which files were read and written; libraries speak meanwhile."""

from __future__ import annotations

import builtins
import contextlib
import os
import site
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from shortstack.common.assets import ASSETS
from shortstack.common.formatting import plain, seconds, size, wrapped
from shortstack.common.phases import Phases, watched
from shortstack.common.progress import say

_MOST = 20  # files of a kind that are listed
_SYSTEM = ("/proc/", "/sys/", "/dev/", "/etc/")


@contextlib.contextmanager
def shown_work(verbose: bool) -> Iterator[None]:
    """Within, with `verbose`, work is watched; what it was is said at the end, also of work that fails."""
    if not verbose:
        yield
        return
    start = time.perf_counter()
    with watched() as phases, _timed_imports(phases), _noted_files() as files, warnings.catch_warnings():
        warnings.simplefilter("default")
        try:
            yield
        finally:
            ended = time.perf_counter()
            files.is_open = False
            for line in (*_times(phases, ended - start), *_lines_of(files)):
                say(plain(line))


def _times(phases: Phases, total: float) -> list[str]:
    rest = total - sum(phases.seconds.values())
    rows = [(what, seconds(taken)) for what, taken in phases.seconds.items() if taken >= 0.005]
    return ["time:", *wrapped([*rows, ("all else", seconds(rest)), ("together", seconds(total))], indent=2).split("\n")]


@contextlib.contextmanager
def _timed_imports(phases: Phases) -> Iterator[None]:
    """Import statements of packages other than this one count as a phase."""
    real: Callable[..., Any] = builtins.__import__
    is_inside = False

    def timed(name: str, *args: Any, **kwargs: Any) -> Any:
        nonlocal is_inside
        if is_inside or name in sys.modules or name.startswith("shortstack"):
            return real(name, *args, **kwargs)
        is_inside = True
        try:
            with phases.within("imports"):
                return real(name, *args, **kwargs)
        finally:
            is_inside = False

    builtins.__import__ = timed
    try:
        yield
    finally:
        builtins.__import__ = real


class _Files:
    """Files that Python opened, in order: path -> whether it was written."""

    def __init__(self) -> None:
        self.written: dict[str, bool] = {}
        self.is_open = True

    def note(self, event: str, args: tuple[Any, ...]) -> None:
        """Take one of Python's audit events."""
        if not self.is_open:
            return
        if event == "open" and isinstance(args[0], (str, bytes)):
            path = os.path.abspath(os.fsdecode(args[0]))
            writes = bool((args[2] or 0) & (os.O_WRONLY | os.O_RDWR))
            self.written[path] = self.written.get(path, False) or writes
        elif event == "os.rename":
            old, new = (os.path.abspath(os.fsdecode(one)) for one in args[:2])
            self.written = {
                new + path[len(old) :] if path == old or path.startswith(old + os.sep) else path: writes
                for path, writes in self.written.items()
            }


_listener: Callable[[str, tuple[Any, ...]], None] | None = None
_hooked = False


@contextlib.contextmanager
def _noted_files() -> Iterator[_Files]:
    global _hooked, _listener
    files = _Files()
    if not _hooked:  # a hook stays as long as the process; without a listener it does nothing
        sys.addaudithook(lambda event, args: _listener(event, args) if _listener is not None else None)
        _hooked = True
    _listener = files.note
    try:
        yield files
    finally:
        _listener = None  # to show them opens files, too


def _lines_of(files: _Files) -> list[str]:
    lines = []
    for heading, writes in (("files read:", False), ("files written:", True)):
        paths = [path for path, one in files.written.items() if one == writes and _is_of_the_work(path)]
        lines += [heading] if paths else []
        lines += [f"  {path} ({size(os.path.getsize(path))})" for path in paths[:_MOST]]
        lines += [f"  and {len(paths) - _MOST} more"] if len(paths) > _MOST else []
    return lines


def _is_of_the_work(path: str) -> bool:
    """Whether it is a file that is there, and neither Python's, nor a library's, nor the system's."""
    if not os.path.isfile(path) or path.startswith(_SYSTEM):
        return False
    of_python = [*sysconfig.get_paths().values(), *site.getsitepackages(), str(ASSETS.parent)]
    return path.startswith(f"{ASSETS}{os.sep}") or not path.startswith(tuple(f"{one}{os.sep}" for one in of_python))
