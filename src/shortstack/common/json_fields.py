"""JSON records that anyone may have edited: each field is checked where it is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def nested(record: Any, *keys: str) -> Any:
    """An inner value, or None where something on the way is missing or is no object."""
    for key in keys:
        record = record.get(key) if isinstance(record, Mapping) else None
    return record


def text(record: Any, key: str) -> str:
    """A string.

    Raises:
        TypeError: it is something else, or `record` is no object.
    """
    found: str = _checked(record, key, str, "a string")
    return found


def mapping(record: Any, key: str) -> dict[str, Any]:
    """An object.

    Raises:
        TypeError: it is something else, or `record` is no object.
    """
    found: dict[str, Any] = _checked(record, key, dict, "an object")
    return found


def block_numbers(record: Any, key: str) -> tuple[int, ...]:
    """A list of whole numbers from 0 up.

    Raises:
        TypeError: it is something else, or `record` is no object.
    """
    found: list[Any] = _checked(record, key, list, "a list of block numbers")
    if not all(type(number) is int and 0 <= number < 1 << 31 for number in found):
        raise TypeError(f"{key} holds something other than block numbers")
    return tuple(found)


def number(value: Any, key: str) -> float:
    """A number, not a boolean.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{key} is {value!r:.60}, expected a number")
    return float(value)


def amount(value: Any, key: str) -> float:
    """A number from 0 up that can be shown: a time, a size, a count.

    Raises:
        TypeError: it is something else, such as NaN.
    """
    if not 0 <= number(value, key) < 1e18:
        raise TypeError(f"{key} is {value!r:.60}, expected a number from 0 up")
    return float(value)


def _checked(record: Any, key: str, kind: type, expected: str) -> Any:
    if not isinstance(record, dict):
        raise TypeError(f"expected an object that holds {key}, found {type(record).__name__}")
    if key not in record:
        raise TypeError(f"lacks {key}")
    if not isinstance(record[key], kind):
        raise TypeError(f"{key} is {record[key]!r:.60}, expected {expected}")
    return record[key]
