"""The options of repairs: which map, what it is fitted on, and how the writing goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shortstack.common.options import Options, expect
from shortstack.data.calibration import CalibrationOptions

Method = Literal["auto", "scale", "linear", "full"]
# A map of the states of hundreds of channels needs many tokens: what is fitted on 2,048 is worse than nothing.
WINDOWS = CalibrationOptions(samples=128, seq_len=256)
VALIDATION_SHARE = 4  # as many windows are fitted on as these times those that choose
TRIED = 2  # of the ridges of a method, by the loss
SCREENED = 4  # one in so many validation windows tells the candidates of one method apart
_BEHIND = {"auto": 2, "full": 2}


@dataclass(frozen=True)
class RepairOptions(Options):
    """How a cut is repaired.

    Attributes:
        behind: The number of blocks behind each cut to repair, too; each is fitted to the dense model's hidden states
            behind the same block. By default it is 2 with `auto` and `full`, and 0 with the published `scale` and
            `linear`.
        first_token: Fit on the first token of each window, too. By default both fits are made, and the loss on other
            windows chooses: in most models the hidden states of this token are hundreds of times as large as all
            others, and a map is applied to it even if it was fitted without it.
        padding: Fit on padding at the end of windows, too.
    """

    behind: int | None = None
    first_token: bool | None = None
    padding: bool = False

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        expect(self.behind is None or self.behind >= 0, "behind", self.behind, "a whole number of at least 0")

    def behind_with(self, method: Method) -> int:
        """How many blocks behind each cut are repaired."""
        return _BEHIND.get(method, 0) if self.behind is None else self.behind
