"""Places on somebody's disk, taken out of what others read: cards, reports, records that are pushed."""

from __future__ import annotations

import re
from typing import Any

from shortstack.common.source_names import before_and_place

# Where a path begins: /, ~/, ./, ../ or C:\, also behind file://; before it neither a word nor a scheme (https:/).
_START = r"(?:file://)?(?:~[\w.-]*|\.{1,2}|[A-Za-z]:)?[/\\]"
_WHOLE = re.compile(rf"{_START}[^\n]*")
_INSIDE = re.compile(rf"(?<![\w/\\.~>)-]){_START}(?:[^\s/\\'\"`,;|()<>\[\]{{}}]+[/\\]+)+([^\s/\\'\"`,;|()<>\[\]{{}}]*)")
_DATA_FILE = re.compile(r".*\.(?:txt|raw|tokens|text|jsonl?|parquet|arrow|csv|tsv|zst|gz|xz|zip|ya?ml)")


def public_name(source: str) -> str:
    """What others call a model or a text: a hub id or a name as it is, of a path its last part.

    `org/name` may be either. Here it is taken for an id, unless it ends as a file of texts does.
    """
    return ", ".join(_public(part.strip()) for part in source.split(",") if part)


def is_path(source: str) -> bool:
    """Whether a source can only be a path, whatever files exist."""
    if re.match(r"(?!file:)\w+://", source):
        return False
    return bool(_WHOLE.fullmatch(source)) or "\\" in source or source.count("/") > 1 or _is_data_file(source)


def without_paths(value: Any) -> Any:
    """A record, or a text, with every path shortened to its last part; names of files, ids and addresses stay."""
    if isinstance(value, dict):
        return {without_paths(key): without_paths(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(one) for one in value]
    if not isinstance(value, str):
        return value
    if _WHOLE.fullmatch(value) and not re.search(r": |,", value):
        return _last(value)
    value = _INSIDE.sub(lambda match: match[1] or "...", value)
    return value if " " in value else ",".join(map(_public, value.split(",")))


def _public(source: str) -> str:
    """A source without the folders of its path; what names it stays."""
    before, place = before_and_place(source)
    return before + (_last(place) if is_path(place) else place)


def _is_data_file(source: str) -> bool:
    return "/" in source and _DATA_FILE.fullmatch(source) is not None


def _last(path: str) -> str:
    return re.split(r"[/\\]+", path.rstrip("/\\"))[-1] or "..."
