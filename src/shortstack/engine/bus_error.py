"""An error, in words, where a file that is mapped shrinks under a run.

Its pages are gone then, and whoever touches one is sent SIGBUS, which ends a process without a word. No Python handler can
run, because the thread never gets past the access; a C handler can, and this one is Python behind a C function. The access
is one of torch's, which holds neither the interpreter nor the allocator: that is why such a handler may run at all.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections import Counter
from pathlib import Path

from shortstack.runtime.memory import libc

_lock = threading.Lock()
_sizes: dict[Path, int] = {}
_uses: Counter[Path] = Counter()
_before = ctypes.create_string_buffer(1024)  # a `struct sigaction`, whatever it looks like here


def watch(path: Path, size: int) -> None:
    """From now on an access to a page that this file of `size` bytes no longer has ends the process with an error.

    Raises:
        OSError: there is no C library to ask, and nothing is watched.
    """
    with _lock:
        if not _uses:
            library = libc()
            if library is None:
                raise OSError("no C library")
            library.sigaction(signal.SIGBUS, None, _before)
            library.signal(signal.SIGBUS, _handler)
        _uses[path] += 1
        _sizes[path] = size


def unwatch(path: Path) -> None:
    """The file is used no longer; after the last one, what was there before handles the signal again."""
    with _lock:
        _uses[path] -= 1
        if not _uses[path]:
            del _uses[path], _sizes[path]
        if not _uses:
            libc().sigaction(signal.SIGBUS, _before, None)


def _message() -> str:
    for path, size in _sizes.items():
        found = path.stat().st_size if path.exists() else 0
        if found < size:
            return (
                f"error: {path}: has {found} of its {size} bytes; it was changed while it was read\n"
                "hint: download the checkpoint again, then run the same command"
            )
    return (
        f"error: {', '.join(map(str, _sizes))}: cannot be read any more (SIGBUS: the disk or the mount failed?)\n"
        "hint: check the disk and the mount (dmesg), or use --memory streamed, then run the same command"
    )


def _end(_: int) -> None:
    os.write(2, f"\n{_message()}\n".encode(errors="replace"))
    os._exit(1)  # nothing that was computed from the pages can be trusted, so nothing is written


_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(_end)
