"""What a file beside the weights says about the model's blocks: how many there are, one value for each, or one by its number.

Such a file (another framework's config, an index of another form of the weights, statistics per block) is wrong once
blocks are gone. Tokenizers, templates and licences say nothing about blocks and are not looked at: a token may be `h.2`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from shortstack.checkpoint.anatomy import Anatomy

_SILENT = re.compile(
    r"(.*token.*|vocab.*|merges.*|tekken.*|chat_template.*|(pre)?processor.*|video_preprocessor.*|generation_config.*|licen[cs]e.*"
    r"|notice.*|.*\.(model|tiktoken|jinja|md|txt|pdf|png|jpe?g|gif|svg|webp))",
    re.IGNORECASE,
)
# `n_layers`, `num_hidden_layers`, `block_count`, `layer_range`, whatever stands before a dot
_COUNT = r"(?:(?:n|num|number_of|total)_(?:[a-z]+_)?(?:layers?|blocks?)|(?:layers?|blocks?)_(?:count|range)|layers)"
_NUMBERED = re.compile(rb"(?<![A-Za-z0-9])(?:layers?|blocks?|blk|h)[./_\[](\d{1,5})(?=[./_\]\"'])")

NUMBER, EACH, NAMES = "states the number of blocks", "has a value for each block", "names blocks by number"


def restates(name: str, data: bytes, anatomy: Anatomy) -> str | None:
    """Why a file holds for this depth alone, or None where it says nothing about blocks.

    Args:
        name: the file's name.
        data: what is in it.
        anatomy: of the checkpoint that it lies beside.
    """
    if _SILENT.fullmatch(name):
        return None
    try:
        content = json.loads(data) if name.endswith(".json") else None
    except (ValueError, RecursionError):
        content = None
    depth = anatomy.depth
    if content is not None:
        for key, value in _entries(content):
            if reason := _entry(key, value, depth):
                return reason
    elif re.search(rf"(?mi)^[\s\-\"']*{_COUNT}[\"']?\s*[:=]\s*[\"']?(?:\[\s*\d+\s*,\s*)?{depth}\b".encode(), data):
        return NUMBER
    numbers = {int(number) for number in _NUMBERED.findall(data)}
    return NAMES if len({number for number in numbers if number < depth}) > min(1, depth - 1) else None


def _entry(key: str, value: Any, depth: int) -> str | None:
    name = key.lower().replace("-", "_").rpartition(".")[2]
    if re.fullmatch(_COUNT, name) and (value == depth or (isinstance(value, list) and value[-1:] == [depth])):
        return NUMBER
    about_blocks = "layer" in name or "block" in name
    if isinstance(value, list) and len(value) == depth > 1 and about_blocks:
        return EACH
    return EACH if isinstance(value, dict) and depth > 1 and value.keys() == set(map(str, range(depth))) else None


def _entries(content: Any) -> Iterator[tuple[str, Any]]:
    """All (key, value) pairs of nested JSON."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield key, value
            yield from _entries(value)
    elif isinstance(content, list):
        for value in content:
            yield from _entries(value)
