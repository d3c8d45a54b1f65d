"""shortstack.json: where a checkpoint came from, which original blocks it keeps, and what chose them."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

from shortstack.common.json_fields import block_numbers, mapping
from shortstack.common.json_text import read_json
from shortstack.errors import ShortstackError
from shortstack.runtime.hashes import RECORD_NAME

FILE_NAME = RECORD_NAME
SCHEMA = 1
# What retraining leaves beside the weights: about one run, and not copied when the checkpoint is worked on further.
RETRAINING_FILES = ("metrics.jsonl", "loss.png", "retraining.json")
# What pruning leaves there of the search that chose the blocks; as little copied.
PLAN_FILE = "plan.json"


def read(directory: Path) -> dict[str, Any] | None:
    """The record of a checkpoint that shortstack wrote, or None for any other."""
    path = directory / FILE_NAME
    if not path.is_file():
        return None
    try:
        record = read_json(path.read_bytes())
        kept = block_numbers(record, "kept_blocks")
        if kept != tuple(sorted(set(kept))):
            raise TypeError("kept_blocks must rise, each block once")
        depth = record.get("original_depth", kept[-1] + 1 if kept else 1)
        if type(depth) is not int or depth <= (kept[-1] if kept else 0):
            raise TypeError(f"original_depth is {depth!r}, which does not fit kept_blocks")
        steps = record.get("steps", [])
        if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
            raise TypeError("steps is not a list of objects")
        files = mapping(record, "files") if "files" in record else {}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ShortstackError(
            f"{path}: not a record of shortstack ({error})",
            hint="remove the file; blocks are then numbered as they are in this checkpoint",
        ) from None
    return {**record, "original_depth": depth, "steps": steps, "files": files}


def versions(*also: str) -> dict[str, str]:
    """Versions that a figure may depend on (those of `also` too), without importing anything heavy."""
    found = {"python": platform.python_version()}
    for name in ("shortstack", "torch", "transformers", "tokenizers", "safetensors", "numpy", *also):
        version = _version(name)
        if version is not None:
            found[name] = version
    return found


@functools.cache
def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
