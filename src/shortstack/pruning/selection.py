"""How sets of blocks are searched: what a user writes, such as `beam:4`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from shortstack.errors import UsageError, did_you_mean

SELECTIONS = ("one-shot", "contiguous", "greedy", "beam", "evolution", "swaps", "gate")
_NUMBERS = {  # what the number after the colon is, and what it is where none is given
    "beam": ("sets kept for the next step", 4),
    "evolution": ("generations", 20),
    "swaps": ("generations", 10),
    "gate": ("sets that are measured", 32),
}


@dataclass(frozen=True)
class Selection:
    """How sets are searched.

    Attributes:
        name: as the user wrote it, such as `beam:4`.
        kind: one of SELECTIONS.
        number: of sets that a beam keeps for its next step, of generations, or of sets that gates propose.
        rescore: the criterion that scores again after each step of greedy; None where losses are measured.
    """

    name: str
    kind: str
    number: int = 1
    rescore: str | None = None


def parse_selection(text: str, rescore: str | None = None) -> Selection:
    """`beam:4` -> a beam of four sets; `evolution:50` -> fifty generations.

    Args:
        text: as the user wrote it.
        rescore: the criterion that scores again after each step of greedy, in place of measured losses.

    Raises:
        UsageError: no such selection, or a number that is not wanted or out of range.
    """
    kind, colon, number = text.partition(":")
    if kind not in SELECTIONS:
        raise UsageError(f"--selection {text!r}: no such selection", hint=did_you_mean(kind, SELECTIONS))
    if rescore is not None:
        if text != "greedy":
            raise UsageError(f"--rescore {rescore}: no effect with --selection {text}", hint="--selection greedy")
        return Selection(f"greedy, rescored by {rescore}", kind, rescore=rescore)
    what, usual = _NUMBERS.get(kind, ("", 1))
    if not colon:
        return Selection(text, kind, usual)
    if not what:
        raise UsageError(f"--selection {text!r}: {kind} takes no number", hint=kind)
    if not re.fullmatch(r"\d{1,5}", number) or int(number) < 1:
        raise UsageError(f"--selection {text!r}: expected the number of {what} after the colon", hint=f"{kind}:{usual}")
    return Selection(text, kind, int(number))
