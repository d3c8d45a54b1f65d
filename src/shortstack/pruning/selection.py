"""How sets of blocks are searched: what a user writes, such as `beam:4`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from shortstack.errors import UsageError, did_you_mean

SELECTIONS = ("one-shot", "contiguous", "greedy", "beam", "evolution")


@dataclass(frozen=True)
class Selection:
    """How sets are searched.

    Attributes:
        name: as the user wrote it, such as `beam:4`.
        kind: one of SELECTIONS.
        width: sets that go on to the next step of a beam.
        generations: of the evolutionary search.
    """

    name: str
    kind: str
    width: int = 1
    generations: int = 20


def parse_selection(text: str) -> Selection:
    """`beam:4` -> a beam of four sets; `evolution:50` -> fifty generations.

    Raises:
        UsageError: no such selection, or a number that is not wanted or out of range.
    """
    kind, colon, number = text.partition(":")
    if kind not in SELECTIONS:
        raise UsageError(f"--selection {text!r}: no such selection", hint=did_you_mean(kind, SELECTIONS))
    if not colon:
        return Selection(text, kind, width=4 if kind == "beam" else 1)
    if kind not in ("beam", "evolution"):
        raise UsageError(f"--selection {text!r}: {kind} takes no number", hint=kind)
    if not re.fullmatch(r"\d{1,5}", number) or int(number) < 1:
        what = "sets that go on to the next step" if kind == "beam" else "generations"
        raise UsageError(f"--selection {text!r}: expected the number of {what} after the colon", hint=f"{kind}:4")
    return Selection(text, kind, **{"width" if kind == "beam" else "generations": int(number)})
