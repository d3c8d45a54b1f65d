"""Hashes of some tokens of each calibration window, by which another text can be found to hold it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from shortstack.common.json_fields import nested

if TYPE_CHECKING:
    import numpy as np

_MARK = 32  # tokens of a window that are enough to find it again


def marks_of(windows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """A hash of some tokens from the middle of each window, by which another text can be found to hold it."""
    length = min(_MARK, min(map(len, windows)) // 2)
    starts = [(len(window) - length) // 2 for window in windows]
    pieces = [window[start : start + length] for window, start in zip(windows, starts, strict=True)]
    return {"tokens": length, "hashes": [f"{int(_rolling(piece, length)[0]):016x}" for piece in pieces]}


def marked_windows(marks: Any, ids: Sequence[int]) -> int:
    """How many of the windows that `marks_of` described stand in a text, wherever they were cut from it.

    Args:
        marks: what `marks_of` gave, from a record; anything else has no windows.
        ids: the tokens of the text.
    """
    length, hashes = nested(marks, "tokens"), nested(marks, "hashes")
    if type(length) is not int or not 1 <= length <= len(ids) or not isinstance(hashes, list):
        return 0
    there = {f"{number:016x}" for number in _rolling(ids, length).tolist()}
    return sum(known in there for known in hashes)


def _rolling(ids: Sequence[int], length: int) -> np.ndarray:
    """A 64-bit hash of each run of `length` tokens."""
    import numpy as np

    tokens = np.asarray(ids, dtype=np.uint64) + np.uint64(1)
    places = len(tokens) - length + 1
    found = np.zeros(places, dtype=np.uint64)
    for offset in range(length):
        found = found * np.uint64(0x9E3779B97F4A7C15) + tokens[offset : offset + places]  # modulo 2 ** 64
        found ^= found >> np.uint64(29)
    return found
