"""`greedy --rescore CRITERION`: remove the block that scores lowest, score what is left, and so on.

What is left is written as a checkpoint at each step, in the folder of the run's state: any criterion can score it, and what
is called between steps can change it, a repair for example.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shortstack.artifacts.scores import CriterionScores
from shortstack.checkpoint.drop_blocks import reason_against
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.json_text import read_json
from shortstack.common.progress import Progress
from shortstack.errors import ShortstackError, UsageError
from shortstack.families.open_model import open_model
from shortstack.pruning.options import BlockChoice
from shortstack.pruning.plan import plan_for
from shortstack.runtime.atomic_output import write_json
from shortstack.scoring.criteria import RequestedCriterion, parse_criteria


@dataclass(frozen=True)
class Between:
    """What changes the checkpoint of each step before it is scored.

    Attributes:
        change: called with its folder.
        key: what the change depends on.
    """

    change: Callable[[Path], object]
    key: dict[str, Any]


@dataclass
class Rescoring:
    """Steps of one block each. Blocks have their numbers in the original model.

    Attributes:
        checkpoint: what the steps begin with.
        free: the removable blocks.
        score: gives the scores of a checkpoint's blocks.
        folder: where checkpoints of steps lie, one at a time, and which blocks are gone.
        key: what must agree for what an earlier run chose to be used.
        progress: where steps are told of.
        between: what changes each step's checkpoint before it is scored; None leaves them as they are.
        removed: so far, in their order; known once steps were requested.
    """

    checkpoint: Checkpoint
    free: Collection[int]
    score: Callable[[Checkpoint], CriterionScores]
    folder: Path
    key: dict[str, Any]
    progress: Progress
    between: Between | None = None
    removed: list[int] = field(default_factory=list)
    _written: int = 0

    def first(self, wanted: int) -> list[int]:
        """The first so many blocks to go.

        Raises:
            ShortstackError: no further block can be removed exactly.
        """
        key = {**self.key, **({"between": self.between.key} if self.between is not None else {})}
        if not self.removed:
            self.removed = self._earlier(key)
        while len(self.removed) < wanted:
            self.removed.append(self._next())
            write_json(self._state, {"key": key, "removed": self.removed})
        return self.removed[:wanted]

    def _earlier(self, key: dict[str, Any]) -> list[int]:
        """What an earlier run with the same key removed."""
        try:
            found = read_json(self._state.read_bytes())
        except (OSError, ValueError):
            return []
        return list(found["removed"]) if found.get("key") == key else []

    def _next(self) -> int:
        current = self._current()
        scores = self.score(current)
        refused = ""
        for block in (block for block in scores.order if block in self.free):
            kept = [place for place, index in enumerate(current.original_blocks) if index != block]
            reason = reason_against(current, kept)
            if reason is None:
                self.progress.say(
                    f"step {len(self.removed) + 1}: block {block} is removed; it has the lowest score" + refused
                )
                return block
            refused = f" of the removable blocks (block {block} is not: {reason})"
        raise ShortstackError(
            f"{self.checkpoint.source}: after {len(self.removed)} steps no block can be removed exactly{refused}",
            hint="remove fewer blocks",
        )

    def _current(self) -> Checkpoint:
        """The checkpoint without what is gone, written step by step as far as it is not."""
        from shortstack.pruning.prune import write_pruned

        current = self.checkpoint if not self._written else open_model(str(self._step(self._written)))
        while self._written < len(self.removed):
            planned = plan_for(current, BlockChoice(blocks=str(self.removed[self._written])))
            following = self._step(self._written + 1)
            shutil.rmtree(following, ignore_errors=True)
            following.mkdir(parents=True)
            write_pruned(current, planned, following)
            if self.between is not None:
                self.between.change(following)
            if self._written:
                shutil.rmtree(self._step(self._written))
            self._written += 1
            current = open_model(str(following))
        return current

    def _step(self, number: int) -> Path:
        return self.folder / f"step-{number}"

    @property
    def _state(self) -> Path:
        return self.folder / "rescored.json"


def parse_rescore(text: str) -> RequestedCriterion:
    """The one criterion that scores single blocks again and again.

    Raises:
        UsageError: an unknown criterion, several of them, or one of runs of blocks.
    """
    criteria = parse_criteria(text)
    if len(criteria) > 1:
        raise UsageError(f"--rescore {text}: expected one criterion", hint=f"--rescore {criteria[0].name}")
    if criteria[0].parameters.get("n", 1) > 1:
        raise UsageError(f"--rescore {text}: scores runs of blocks, not single ones", hint="leave out the parameter n")
    return criteria[0]
