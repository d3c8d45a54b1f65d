"""Linux made to look like macOS to what is called: what that system lacks is gone, and /proc and /sys are not there.

`python -m tests.macos ARGUMENTS` runs the command line so, and after the word `then` the next one. A real system differs in
more; these are the names that fail.
"""

from __future__ import annotations

import builtins
import fcntl
import io
import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable
from typing import Any

# Names of modules that Python has on Linux and lacks on macOS (typeshed), and `preadv`, which came with macOS 11.
LACKING = {
    "os": (
        "fdatasync", "posix_fadvise", "posix_fallocate", "sched_getaffinity", "sched_setaffinity", "preadv", "pwritev",
        "copy_file_range", "splice", "memfd_create", "eventfd", "pidfd_open", "setresuid", "getrandom", "getxattr",
        "setxattr", "listxattr", "O_DIRECT", "O_TMPFILE", "O_LARGEFILE", "O_NOATIME", "O_RSYNC", "O_PATH",
        "RWF_NOWAIT", "RWF_HIPRI", "RWF_DSYNC", "RWF_SYNC", "POSIX_FADV_DONTNEED", "POSIX_FADV_SEQUENTIAL",
        "POSIX_FADV_WILLNEED", "POSIX_FADV_NORMAL", "POSIX_FADV_RANDOM", "POSIX_FADV_NOREUSE",
    ),
    "mmap": (
        "MADV_HUGEPAGE", "MADV_NOHUGEPAGE", "MADV_REMOVE", "MADV_DONTFORK", "MADV_DOFORK", "MADV_HWPOISON",
        "MADV_MERGEABLE", "MADV_UNMERGEABLE", "MADV_DONTDUMP", "MADV_DODUMP", "MAP_DENYWRITE", "MAP_EXECUTABLE",
        "MAP_POPULATE", "MAP_STACK",
    ),
    "signal": ("SIGPWR", "SIGSTKFLT", "SIGPOLL", "SIGCLD", "SIGRTMIN", "SIGRTMAX", "sigtimedwait", "sigwaitinfo"),
    "resource": ("prlimit", "RUSAGE_THREAD", "RLIMIT_OFILE", "RLIMIT_MSGQUEUE", "RLIMIT_NICE", "RLIMIT_RTPRIO"),
    "fcntl": ("F_ADD_SEALS", "F_GET_SEALS", "F_NOTIFY", "F_SETPIPE_SZ"),
}  # fmt: skip


def disguise() -> None:
    """From now on this process has what macOS has. Libraries that were built for Linux must be imported before."""
    for module, names in LACKING.items():
        for name in names:
            if hasattr(__import__(module), name):
                delattr(__import__(module), name)
    fcntl.F_FULLFSYNC = fcntl.F_GETFD  # type: ignore[attr-defined]
    io.open = builtins.open = _without_proc(io.open)  # type: ignore[assignment]
    os.open = _without_proc(os.open)  # type: ignore[assignment]
    os.stat = _without_proc(os.stat)  # type: ignore[assignment]
    os.listdir = _without_proc(os.listdir)  # type: ignore[assignment]
    multiprocessing.set_start_method("spawn", force=True)
    sys.platform = "darwin"


def _without_proc(real: Callable[..., Any]) -> Callable[..., Any]:
    def call(path: Any = ".", *args: Any, **kwargs: Any) -> Any:
        if not isinstance(path, int) and str(os.fspath(path)).startswith(("/proc", "/sys")):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return real(path, *args, **kwargs)

    return call


if __name__ == "__main__":
    import torch.utils.data  # noqa: F401

    from shortstack.runtime.libraries import import_transformers

    import_transformers()
    disguise()
    from shortstack.cli.app import run

    for is_then, words in itertools.groupby(sys.argv[1:], lambda word: word == "then"):
        if not is_then and (code := run(list(words))):
            sys.exit(code)
