"""shortstack.json: where a checkpoint came from, which original blocks it keeps, and what chose them."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

from shortstack.errors import ShortstackError

FILE_NAME = "shortstack.json"
SCHEMA = 1


def read(directory: Path) -> dict[str, Any] | None:
    """The record of a checkpoint that shortstack wrote, or None for any other."""
    path = directory / FILE_NAME
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ShortstackError(f"{path}: not valid JSON: {error}") from None
    kept = record.get("kept_blocks") if isinstance(record, dict) else None
    if not isinstance(kept, list) or not all(type(index) is int and index >= 0 for index in kept):
        raise ShortstackError(f"{path}: lacks kept_blocks, the original indices of the blocks that are here")
    if kept != sorted(set(kept)):
        raise ShortstackError(f"{path}: kept_blocks must rise, each block once")
    return dict(record)


def versions() -> dict[str, str]:
    """Versions that a figure may depend on, without importing anything heavy."""
    found = {"python": platform.python_version()}
    for name in ("shortstack", "torch", "transformers", "tokenizers", "safetensors", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
