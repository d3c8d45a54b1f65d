"""What evaluations found is kept, by all that made it: a second run, or one that was killed, computes nothing twice."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shortstack.common.json_text import json_text, read_json
from shortstack.common.progress import Progress
from shortstack.errors import ShortstackError
from shortstack.runtime.atomic_output import write_file

_FORM = 3  # raised when what is kept, or how it is computed, changes


def kept_folder() -> Path:
    """Where findings lie: `$SHORTSTACK_CACHE`, else `shortstack` in the user's cache."""
    chosen = os.environ.get("SHORTSTACK_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shortstack"


def kept_or_made(
    key: dict[str, Any],
    make: Callable[[], dict[str, Any]],
    *,
    fresh: bool,
    progress: Progress,
    what: str,
    or_of: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What `make` gives, or gave to an earlier run with an equal key.

    Args:
        key: everything that the finding depends on.
        make: computes it: an object that JSON can hold.
        fresh: compute it in any case.
        progress: says where something was found.
        what: what it is, for that line.
        or_of: the key of a larger finding that holds this one, too.
    """
    found = None if fresh else kept(key)
    if found is None and or_of is not None and not fresh:
        found = kept(or_of)
    if found is not None:
        progress.say(f"{what}: found by an earlier run (--fresh computes it again)")
        return found
    found = make()
    keep(key, found)
    return found


def kept(key: dict[str, Any]) -> dict[str, Any] | None:
    """What was kept under an equal key; None where nothing was."""
    path, text = _place(key)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        record = read_json(path.read_bytes())
        if json_text(record["key"], sort_keys=True) == text:
            found: dict[str, Any] = record["found"]
            return found
    return None


def keep(key: dict[str, Any], found: dict[str, Any]) -> None:
    """Keep a finding for runs with an equal key."""
    path, text = _place(key)
    with contextlib.suppress(ShortstackError):  # a cache that cannot be written costs time, not the result
        write_file(path, json_text({"key": read_json(text), "found": found}).encode())


def forget(key: dict[str, Any]) -> None:
    """Keep it no longer."""
    with contextlib.suppress(OSError):
        _place(key)[0].unlink(missing_ok=True)


def _place(key: dict[str, Any]) -> tuple[Path, str]:
    """(where a finding lies, its key as text)."""
    text = json_text({"form": _FORM, **key}, sort_keys=True)
    return kept_folder() / "results" / f"{hashlib.sha256(text.encode()).hexdigest()[:40]}.json", text
