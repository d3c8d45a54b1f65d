"""The published "+" rule: the first four and the last two blocks stay, whatever their scores."""

from __future__ import annotations

from collections.abc import Sequence

PROTECTED_FIRST = 4
PROTECTED_LAST = 2
PLUS_FROM_DEPTH = 10  # below this depth the published rule would protect most of the model


def protected_blocks(blocks: Sequence[int], plus: bool | None) -> tuple[tuple[int, ...], str]:
    """The blocks that the published "+" rule keeps, and a line that says so where the user did not decide."""
    if plus is None:
        plus = len(blocks) >= PLUS_FROM_DEPTH
        note = (
            "" if plus else f"no block is protected below {PLUS_FROM_DEPTH} blocks; --plus keeps the first 4 and last 2"
        )
    else:
        note = ""
    if not plus:
        return (), note
    return tuple(sorted({*blocks[:PROTECTED_FIRST], *blocks[-PROTECTED_LAST:]})), note
