"""The options of pruning: which blocks to remove, which `plan` and `prune` share, and how the writing goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from shortstack.artifacts.sources import ScoresSource
from shortstack.common.option_values import Amount, Listed

Strategy = Literal["one-shot", "contiguous"]


@dataclass(frozen=True)
class BlockChoice:
    """Which blocks to remove: the blocks themselves, or scores and how much to remove.

    Attributes:
        blocks: the blocks to remove, by their numbers in the original model, such as `3,7-9`.
        scores: a scores.json of `shortstack score`, a block_order.csv (block numbers, first removed first), or
            `published:[MODEL:]CRITERION`.
        criterion: which of the scores to use; may be left out when the file holds one.
        remove: how many blocks to remove.
        ratio: remove the most blocks whose share of the parameters is at most this.
        params: remove blocks until the parameters are nearest to this, such as `5.5B`.
        plus: keep the first four and the last two blocks, as published; by default where there are at least 10 blocks.
        strategy: `one-shot` removes the lowest scores; `contiguous` the adjacent run with the lowest sum.
    """

    # What one of them, chosen by hand, takes the place of in a recipe.
    REPLACES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "blocks": ("scores", "criterion", "remove", "ratio", "params", "plus", "strategy"),
        "remove": ("ratio", "params", "blocks"),
        "ratio": ("remove", "params", "blocks"),
        "params": ("remove", "ratio", "blocks"),
    }

    blocks: Listed | None = None
    scores: ScoresSource | None = None
    criterion: str | None = None
    remove: int | None = None
    ratio: float | None = None
    params: Amount | None = None
    plus: bool | None = None
    strategy: Strategy = "one-shot"

    @property
    def amounts(self) -> dict[str, int | float | str]:
        """The options that say how much to remove, by name, as far as they are given."""
        given = {"--remove": self.remove, "--ratio": self.ratio, "--params": self.params}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class CurveOptions:
    """How far a curve goes, and how its sets are chosen.

    Attributes:
        selection: what chooses the set of each size: `greedy`, `beam:4`, `contiguous` or `one-shot`, as in `search`.
        most: the most blocks to remove; by default half of those that may go.
        plus: keep the first four and the last two blocks, as published; by default where there are at least 10 blocks.
    """

    selection: str = "greedy"
    most: int | None = None
    plus: bool | None = None


@dataclass(frozen=True)
class SearchOptions:
    """How many blocks go, and how the set of them is searched.

    Attributes:
        selection: `greedy` removes the block that costs least, measures again, and so on; `beam:4` goes on with the four
            cheapest sets of each step; `evolution:20` changes sets by swaps for 20 generations; `one-shot` and `contiguous`
            take what single blocks cost, and the cheapest run of adjacent ones.
        remove: how many blocks to remove.
        ratio: remove the most blocks whose share of the parameters is at most this.
        params: remove blocks until the parameters are nearest to this, such as `5.5B`.
        plus: keep the first four and the last two blocks, as published; by default where there are at least 10 blocks.
    """

    REPLACES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "remove": ("ratio", "params"),
        "ratio": ("remove", "params"),
        "params": ("remove", "ratio"),
    }

    selection: str = "greedy"
    remove: int | None = None
    ratio: float | None = None
    params: Amount | None = None
    plus: bool | None = None

    def as_choice(self) -> BlockChoice:
        """The same as `plan` has it: how many blocks go, and which are kept."""
        return BlockChoice(remove=self.remove, ratio=self.ratio, params=self.params, plus=self.plus)


@dataclass(frozen=True)
class PruneOptions:
    """How a pruned checkpoint is written.

    Attributes:
        verify: load the result and compare it with the original with those blocks skipped: bytes, config, logits;
            logits that cannot be compared are reported.
        force: replace an output that shortstack made before.
        allow_nonfinite: copy tensors that hold NaN or infinity.
        allow_links: follow links in the checkpoint that lead out of its directory.
        quiet: no progress on stderr.
    """

    verify: bool = False
    force: bool = False
    allow_nonfinite: bool = False
    allow_links: bool = False
    quiet: bool = False
