"""Limits of the container that this process runs in (control groups, version 1 and 2): memory and processors.

A limit holds for all that is in a group or below it, so that every group from the process's own up to the top counts.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc/self")  # tests put another folder here


def memory_limit() -> int | None:
    """Bytes that this process and those in its group may take together; None without a limit."""
    return min((limit for limit, _ in _memory()), default=None)


def memory_left() -> int | None:
    """Bytes that can still be taken before a limit is reached; None without one."""
    left = [limit - used for limit, used in _memory()]
    return max(0, min(left)) if left else None


def processors() -> int:
    """How many processors this process may use: those of its affinity, and no more than its group's share of time."""
    return max(1, min([allowed_processors(), *_quotas()]))


def allowed_processors() -> int:
    """How many processors this process may run on, by its affinity."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> Iterator[tuple[int, int]]:
    """(limit, bytes in use that cannot be taken back) of every group that has a limit."""
    for folder, version in _groups("memory"):
        limits: tuple[str, ...] = ("memory.max", "memory.high")
        used, cached = "memory.current", "inactive_file"
        if version == 1:
            limits, used, cached = ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"
        found = [limit for name in limits if (limit := _number(folder / name)) is not None and limit < 1 << 60]
        if found:
            yield min(found), (_number(folder / used) or 0) - _entry(folder / "memory.stat", cached)


def _quotas() -> Iterator[int]:
    """Processors' worth of time of every group that has a quota, rounded up."""
    for folder, version in _groups("cpu"):
        if version == 2:
            quota, _, period = _text(folder / "cpu.max").partition(" ")
        else:
            quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
        with contextlib.suppress(ValueError, ZeroDivisionError):  # "max", or no such file
            if int(quota) > 0:
                yield math.ceil(int(quota) / int(period))


def _groups(controller: str) -> Iterator[tuple[Path, int]]:
    """(folder, version) of this process's group and of all above it, as far as they can be seen from here."""
    for line in _text(_PROC / "cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        version = 1 if controllers else 2
        if version == 1 and controller not in controllers.split(","):
            continue
        for root, mount in _mounts(controller, version):
            # In a container the path may be the host's, which is not visible: then the mount itself is its group.
            below = group.removeprefix(root.rstrip("/")).strip("/")
            folder = mount / below if ".." not in below and (mount / below).is_dir() else mount
            yield from ((place, version) for place in (folder, *folder.parents) if mount in (place, *place.parents))


def _mounts(controller: str, version: int) -> Iterator[tuple[str, Path]]:
    """(group that is mounted, where)."""
    for line in _text(_PROC / "mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        if (version == 2 and kind[0] == "cgroup2") or (
            version == 1 and kind[0] == "cgroup" and controller in kind[2].split(",")
        ):
            yield fields[3], Path(fields[4])


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdigit() else None


def _entry(path: Path, name: str) -> int:
    lines = (line.split() for line in _text(path).splitlines())
    return next((int(words[1]) for words in lines if len(words) == 2 and words[0] == name), 0)
