"""What a run that may be killed keeps until its output is written, and what later runs find again.

One folder beside the output, under the output's lock; in it records that carry their key: all that made them. What a run
left is used by a run with an equal key alone; where the keys differ it can be told in which fields. The cache of findings
holds the same records, in a folder of the user's.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from shortstack.common.json_text import json_text, read_json
from shortstack.errors import ShortstackError
from shortstack.runtime.atomic_output import absolute, locked, write_file, write_json

_CACHE_FORM = 3  # raised when what is kept, or how it is computed, changes
_Output = TypeVar("_Output", bound=Path | None)


@contextlib.contextmanager
def workspace(output: _Output, *, leads: bool = True) -> Iterator[_Output]:
    """Be the only process that makes an output; gives the folder for the state of a run that may be killed.

    The folder stays where the body fails, and goes when it ends well.

    Args:
        output: a file or folder; None, where nothing is written, gives no folder and no lock.
        leads: whether this is the process that writes, of those that share the work.

    Raises:
        ShortstackError: another process is writing the output.
    """
    if output is None:
        yield output
        return
    target = absolute(output)
    folder = target.parent / f".{target.name}.shortstack-work"
    with locked(target) if leads else contextlib.nullcontext():
        yield cast(_Output, folder)
        if leads:
            shutil.rmtree(folder, ignore_errors=True)


def differences(old: Any, key: Mapping[str, Any]) -> list[str]:
    """In what the key of a record differs from another, as `name was OLD, now NEW`, by fields; nothing where they agree.

    Args:
        old: what was recorded; anything but an object has no field.
        key: in any form that JSON holds: a tuple is a list.
    """
    old, new, found = old if isinstance(old, dict) else {}, read_json(json_text(key)), []
    for name in sorted({*old, *new}):
        before, now = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            found += [f"{name}.{line}" for line in differences(before, now)]
        elif json_text(before, sort_keys=True) != json_text(now, sort_keys=True):  # NaN is what it was
            found.append(f"{name} was {_short(before)}, now {_short(now)}")
    return found


def _short(value: Any) -> str:
    text = "not there" if value is None else str(value)
    return text if len(text) <= 40 else text[:12] + "..."


def load_state(path: Path, key: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(the record that `save_state` wrote, in what its key differs); an empty one where none can be read."""
    with contextlib.suppress(OSError, ValueError):
        record = read_json(path.read_bytes())
        if isinstance(record, dict) and isinstance(record.get("key"), dict):
            differs = differences(record.pop("key"), key)
            return record, differs
    return {}, []


def save_state(path: Path, key: Mapping[str, Any], **record: Any) -> None:
    """Write a record with its key, whole or not at all."""
    write_json(path, {"key": key, **record})


def load_log(path: Path, key: Mapping[str, Any]) -> tuple[list[Any], list[str]]:
    """(the records that were appended to a log with this key, in what its key differs); the file is ready for more.

    It is rewritten without an incomplete last line: the next line would be appended to that one.
    """
    header, *records = read_log(path) or [None]
    old = header.get("key") if isinstance(header, dict) else None
    differs = [] if old is None else differences(old, key)
    records = [] if old is None or differs else records
    write_file(path, "".join(f"{json_text(line)}\n" for line in ({"key": key}, *records)).encode())
    return records, differs


def append_log(path: Path, records: Iterable[Any]) -> None:
    """Append records to a log, a line each."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(f"{json_text(record)}\n" for record in records))


def read_log(path: Path) -> list[Any]:
    """The lines of a log, up to the first that is not whole: whoever wrote it may have been killed there."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if not line.endswith("\n"):
                break
            found.append(read_json(line))
    return found


def unused(path: Path | None, differs: list[str]) -> str:
    """The line that reports a saved state whose key differs."""
    return f"the saved state in {path} belongs to another run and is not used: {'; '.join(differs)}"


def cache_folder() -> Path:
    """Where findings lie: `$SHORTSTACK_CACHE`, else `shortstack` in the user's cache."""
    chosen = os.environ.get("SHORTSTACK_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shortstack"


def cached(key: dict[str, Any]) -> dict[str, Any] | None:
    """What was kept under an equal key; None where nothing was."""
    record, differs = load_state(*_cache_entry(key))
    return None if differs else record.get("found")


def cache(key: dict[str, Any], found: dict[str, Any]) -> None:
    """Keep a finding for runs with an equal key."""
    with contextlib.suppress(ShortstackError):  # a cache that cannot be written costs time, not the result
        save_state(*_cache_entry(key), found=found)


def forget(key: dict[str, Any]) -> None:
    """Keep it no longer."""
    with contextlib.suppress(OSError):
        _cache_entry(key)[0].unlink(missing_ok=True)


def _cache_entry(key: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """(where a finding lies, its whole key)."""
    whole = {"form": _CACHE_FORM, **key}
    name = hashlib.sha256(json_text(whole, sort_keys=True).encode()).hexdigest()[:40]
    return cache_folder() / "results" / f"{name}.json", whole
