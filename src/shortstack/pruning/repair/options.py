"""The options of repairs: which map, what it is fitted on, and how the writing goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shortstack.common.options import Options, expect

Method = Literal["auto", "scale", "linear", "full"]


@dataclass(frozen=True)
class RepairOptions(Options):
    """How a cut is repaired.

    Attributes:
        behind: The number of blocks behind each cut that are repaired, too: each towards the dense model's states behind
            the same block.
        first_token: Fit on the first token of each window, too. By default it is left out: in most models its hidden
            states are hundreds of times as large as all others.
        padding: Fit on padding at the end of windows, too.
    """

    behind: int = 0
    first_token: bool = False
    padding: bool = False

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        expect(self.behind >= 0, "behind", self.behind, "a whole number of at least 0")
