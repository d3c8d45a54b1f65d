"""The options of pruning: which blocks to remove, which `plan` and `prune` share, and how the writing goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from shortstack.artifacts.sources import ScoresSource
from shortstack.common.option_values import Amount, Listed
from shortstack.common.options import Options
from shortstack.pruning.repair.options import Method

Strategy = Literal["one-shot", "contiguous"]
AMOUNTS = ("remove", "ratio", "params", "bytes", "ppl_ceiling", "speedup")  # options of which one says how much goes


@dataclass(frozen=True)
class Budget(Options):
    """How much to remove: one of these amounts; which blocks stay in any case, and what a set is chosen for.

    Attributes:
        remove: The number of blocks to remove.
        ratio: Remove the most blocks whose share of the parameters is at most this, such as 0.2.
        params: Remove blocks until the number of parameters is nearest to this, such as `5.5B`.
        bytes: Remove the fewest blocks without which the weights take at most this, such as `12GB`.
        ppl_ceiling: Remove the most blocks without which the measured perplexity is at most this, such as `12.5`, or
            `1.2x` for 1.2 times the dense model's. It needs a search.
        speedup: Remove the fewest blocks without which generation is so many times as fast, such as 1.3. What a token
            takes in each block, and in embeddings and head, is measured first, in a few seconds.
        plus: Keep the first four and the last two blocks, as published. By default they stay where there are at least
            10 blocks.
        objective: What the set is chosen for, where the text has named sources: their `mean`, the source that is hit
            `worst` beside its dense loss, or weights such as `general=2,code=1`.
    """

    # What one of them, chosen by hand, takes the place of in a recipe.
    REPLACES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        name: tuple(other for other in AMOUNTS if other != name) for name in AMOUNTS
    }

    remove: int | None = None
    ratio: float | None = None
    params: Amount | None = None
    bytes: Amount | None = None
    ppl_ceiling: Amount | None = None
    speedup: float | None = None
    plus: bool | None = None
    objective: str | None = None

    @property
    def amounts(self) -> dict[str, int | float | str]:
        """The options that say how much to remove, by name, as far as they are given."""
        given = {f"--{name.replace('_', '-')}": getattr(self, name) for name in AMOUNTS}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class BlockChoice(Budget):
    """Which blocks to remove: the blocks themselves, or scores and how much to remove.

    Attributes:
        blocks: The blocks to remove, by their numbers in the original model, such as `3,7-9`.
        scores: Choose by these scores: a scores.json of `shortstack score`, a block_order.csv (block numbers, first
            removed first), or `published:[MODEL:]CRITERION`.
        criterion: Choose by this criterion. It may be left out where the scores hold only one.
        strategy: How the blocks are chosen: `one-shot` removes those with the lowest scores, `contiguous` the adjacent
            ones with the lowest sum.
    """

    REPLACES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "blocks": ("scores", "criterion", *AMOUNTS, "plus", "strategy", "objective"),
        **{name: (*others, "blocks") for name, others in Budget.REPLACES.items()},
    }

    blocks: Listed | None = None
    scores: ScoresSource | None = None
    criterion: str | None = None
    strategy: Strategy = "one-shot"


@dataclass(frozen=True)
class PruneChoice(BlockChoice):
    """Which blocks to remove: the blocks themselves, scores and how much to remove, or a search.

    Attributes:
        selection: Search the set of blocks by measuring sets, as `shortstack search` does: `greedy`, `beam:4`,
            `evolution:20`, `gate:32`, `contiguous` or `one-shot`.
        rescore: Remove the block that scores lowest by this criterion, score what is left, and so on. It needs
            `selection="greedy"`.
    """

    REPLACES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **BlockChoice.REPLACES,
        "blocks": (*BlockChoice.REPLACES["blocks"], "selection", "rescore"),
        "selection": ("rescore", "blocks", "scores", "criterion", "strategy"),
    }

    selection: str | None = None
    rescore: str | None = None


@dataclass(frozen=True)
class CurveOptions(Options):
    """How far a curve goes, and how its sets are chosen.

    Attributes:
        selection: How the set of each size is chosen: `greedy`, `beam:4`, `gate:32`, `contiguous` or `one-shot`, as in
            `shortstack search`.
        most: The most blocks to remove. By default it is half of those that may be removed.
        plus: Keep the first four and the last two blocks, as published. By default they stay where there are at least
            10 blocks.
        objective: What sets are chosen for, where the text has named sources: their `mean`, the source that is hit
            `worst` beside its dense loss, or weights such as `general=2,code=1`.
    """

    selection: str = "greedy"
    most: int | None = None
    plus: bool | None = None
    objective: str | None = None


@dataclass(frozen=True)
class SearchOptions(Budget):
    """How many blocks go, and how the set of them is searched.

    Attributes:
        selection: How the set is searched: `greedy` removes the block that costs least, measures again, and so on;
            `beam:4` continues with the four cheapest sets of each step; `evolution:20` changes sets by swaps for 20
            generations; `gate:32` measures the 32 sets that a quadratic model of gates on the blocks holds to be the
            cheapest; `one-shot` and `contiguous` take what single blocks cost, and the cheapest run of adjacent ones.
        rescore: Remove the block that scores lowest by this criterion, score what is left, and so on. It needs the
            selection `greedy`.
    """

    selection: str = "greedy"
    rescore: str | None = None


@dataclass(frozen=True)
class PruneOptions(Options):
    """How a pruned checkpoint is written.

    Attributes:
        verify: Load the result and compare it with the original with those blocks skipped: bytes, config, logits.
            Logits that cannot be compared are reported.
        repair: Repair the cuts without training, as `shortstack repair` does by this method. The calibration windows are
            those to fit on; 128 of 256 tokens where nothing is said.
        force: Replace an output that shortstack made before.
        allow_nonfinite: Copy tensors that hold NaN or infinity.
    """

    verify: bool = False
    repair: Method | None = None
    force: bool = False
    allow_nonfinite: bool = False
