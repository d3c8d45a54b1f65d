"""Are these windows enough? Whether the blocks that would be removed still change with more of them.

Legend: N blocks, W windows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from shortstack.artifacts.protected import protected_blocks
from shortstack.common.significance import student_errors
from shortstack.errors import UsageError

if TYPE_CHECKING:
    import torch

    from shortstack.checkpoint.reader import Checkpoint

Until = Literal["stable"]

ROUNDS = 3  # in which the set must not change


@dataclass(frozen=True)
class Rounds:
    """How windows are added.

    Attributes:
        size: windows of a round.
        remove: how many blocks would go.
        plus: whether the first four and the last two stay; None for the default.
    """

    size: int
    remove: int
    plus: bool | None

    def stability(self, checkpoint: Checkpoint, candidates: Sequence[int] | None = None) -> Stability:
        """What is watched.

        Args:
            candidates: positions of the blocks that are scored; all by default.

        Raises:
            UsageError: no such set can be chosen.
        """
        blocks = checkpoint.original_blocks
        protected = protected_blocks(blocks, self.plus)[0]
        scored = blocks if candidates is None else tuple(blocks[index] for index in candidates)
        return Stability(scored, tuple(block for block in protected if block in scored), self.remove)


@dataclass
class Stability:
    """Watches the chosen set as rounds of windows come in.

    Attributes:
        blocks: original numbers of the blocks, in order.
        protected: those that may not be removed.
        remove: how many go.
        chosen: the set after each round.
        windows: how many windows had been seen then.
        reason: why it ended; empty while it has not.
    """

    blocks: Sequence[int]
    protected: Sequence[int]
    remove: int
    chosen: list[tuple[int, ...]] = field(default_factory=list)
    windows: list[int] = field(default_factory=list)
    reason: str = ""

    def __post_init__(self) -> None:
        free = len(self.blocks) - len(self.protected)
        if not 1 <= self.remove < free:
            raise UsageError(
                f"--until stable --remove {self.remove}: expected 1 to {free - 1}: some of the {free} removable blocks "
                "must stay, or there is nothing to choose"
            )

    def judge(self, nll_NW: torch.Tensor) -> bool:
        """Look at all windows so far; whether they are enough.

        Args:
            nll_NW: mean NLL per predicted token without block n, on window w.
        """
        free = [place for place, block in enumerate(self.blocks) if block not in self.protected]
        mean = nll_NW.mean(dim=1)
        order = sorted(free, key=lambda place: (float(mean[place]), place))
        gone, left = order[: self.remove], order[self.remove :]
        self.chosen.append(tuple(sorted(self.blocks[place] for place in gone)))
        self.windows.append(nll_NW.shape[1])
        if separated(nll_NW, gone, left):
            self.reason = "separated"
        elif len(self.chosen) > ROUNDS and len(set(self.chosen[-ROUNDS - 1 :])) == 1:
            self.reason = "unchanged"
        return bool(self.reason)

    def ended(self) -> None:
        """There are no more windows."""
        self.reason = self.reason or "exhausted"

    def to_json(self) -> dict[str, Any]:
        """What scores.json says about it."""
        return {"remove": self.remove, "reason": self.reason, "says": self.to_text(), "windows": self.windows[-1],
                "rounds": [{"windows": seen, "chosen": list(chosen)}
                           for seen, chosen in zip(self.windows, self.chosen, strict=True)]}  # fmt: skip

    def to_text(self) -> str:
        """The answer, in a line or two."""
        first, last = set(self.chosen[0]), set(self.chosen[-1])
        says = {
            "separated": "every removed block is below every other by more than the 95 % interval of their paired difference",
            "unchanged": f"the {self.remove} blocks have been the same for {ROUNDS} more rounds",
            "exhausted": f"not settled: no more windows; the {self.remove} blocks still change, or are within their errors",
        }[self.reason]
        line = f"{self.windows[-1]} windows: {says}"
        same = len(first & last)
        return f"{line}; the first {self.windows[0]} windows alone would have removed {same} of these {self.remove}"


def separated(nll_NW: torch.Tensor, gone: Sequence[int], left: Sequence[int]) -> bool:
    """Whether every block that goes costs less than every one that stays, beyond the error of their paired difference."""
    import torch

    windows = nll_NW.shape[1]
    if windows < 2 or not gone or not left:
        return False
    difference = nll_NW[torch.tensor(left)][None] - nll_NW[torch.tensor(gone)][:, None]
    error = difference.std(dim=-1, correction=1) / math.sqrt(windows)
    return bool((difference.mean(dim=-1) > student_errors(windows) * error).all())
