"""sha256 of files, and of all that an output holds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from shortstack.common.json_text import json_text, read_json
from shortstack.common.phases import phase

RECORD_NAME = "shortstack.json"  # what shows that shortstack made a directory
_PIECE = 4 << 20  # bytes


@phase("hashes")
def file_sha256(path: Path, progress: Callable[[int], object] = lambda _: None) -> str:
    """sha256 of a file's bytes, a few of them in memory at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(_PIECE):
            digest.update(piece)
            progress(len(piece))
    return digest.hexdigest()


def record_hashes(directory: Path) -> None:
    """Give the record of an output the sha256 of every file beside it; those that were made while writing stay.

    A directory without a record is left as it is.
    """
    path = directory / RECORD_NAME
    if not path.is_file():
        return
    record = read_json(path.read_bytes())
    known = record.get("files", {})
    names = sorted(str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file() and file != path)
    record["files"] = {name: known.get(name) or file_sha256(directory / name) for name in names}
    path.write_text(json_text(record, indent=1) + "\n", encoding="utf-8")
