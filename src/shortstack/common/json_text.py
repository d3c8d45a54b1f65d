"""JSON as every reader takes it: numbers that are not finite have a form of their own.

JSON has neither infinity nor NaN. Python writes them all the same, and other readers stop there. Here such a number is
written as null, and the object around it all names where it was: `{"ppl": null, "not_finite": {"/ppl": "Infinity"}}`, by
JSON pointers (RFC 6901). `read_json` puts them back. An object that has a key `not_finite` of its own keeps its value under
the pointer to the whole: `{"not_finite": {"": 3}}`.
"""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any

NOT_FINITE = "not_finite"


def json_text(record: Any, **style: Any) -> str:
    """A record as JSON, without infinity or NaN.

    Args:
        record: an object, or a list of objects; anything else with such numbers is put into an object as `value`.
        **style: how `json.dumps` writes it: `indent`, `sort_keys`, `default`, ...
    """
    if not any(NOT_FINITE in one for one in _objects(record)):
        with contextlib.suppress(ValueError):  # a number that is not finite
            return json.dumps(record, allow_nan=False, **style)
    return json.dumps(_valid(record), allow_nan=False, **style)


def read_json(data: str | bytes) -> Any:
    """What `json_text` wrote, with infinity and NaN where they were.

    Raises:
        ValueError: not JSON, or `not_finite` names a place that is not there.
    """
    record = json.loads(data)
    for one in _objects(record):
        note = one.get(NOT_FINITE)
        # Anything else under this name is the own key of a file that something else has written.
        if isinstance(note, dict) and note and all(pointer == "" or pointer.startswith("/") for pointer in note):
            del one[NOT_FINITE]
            if "" in note:
                one[NOT_FINITE] = note.pop("")
            for pointer, text in note.items():
                _put_back(one, pointer, float(text))
    return record


def _objects(record: Any) -> list[dict[str, Any]]:
    """The objects that have a note of their own: a record, or those of a list."""
    return [one for one in (record if isinstance(record, (list, tuple)) else [record]) if isinstance(one, dict)]


def _valid(record: Any) -> Any:
    if isinstance(record, (list, tuple)) and all(isinstance(one, dict) for one in record):
        return [_valid(one) for one in record]
    found: dict[str, str] = {}
    whole = record if isinstance(record, dict) else {"value": record}
    valid: dict[Any, Any] = _without(whole, "", found)
    own = {"": valid[NOT_FINITE]} if NOT_FINITE in valid else {}
    return {**valid, NOT_FINITE: {**own, **found}} if own or found else valid


def _without(value: Any, pointer: str, found: dict[str, str]) -> Any:
    """The value with null for every number that is not finite; `found` gets their pointers."""
    if isinstance(value, dict):
        return {key: _without(one, f"{pointer}/{_escaped(str(key))}", found) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without(one, f"{pointer}/{number}", found) for number, one in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        found[pointer] = "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        return None
    return value


def _escaped(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")


def _put_back(record: dict[str, Any], pointer: str, number: float) -> None:
    *way, last = [part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")[1:]]
    holder: Any = record
    try:
        for key in way:
            holder = holder[int(key) if isinstance(holder, list) else key]
        place = int(last) if isinstance(holder, list) else last
        if holder[place] is not None:
            raise ValueError(f"{NOT_FINITE} names {pointer}, which has a value")
        holder[place] = number
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"{NOT_FINITE} names {pointer}, which is not there") from None
