"""The options of pruning: which blocks to remove, which `plan` and `prune` share, and how the writing goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
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
        bytes: Remove the fewest blocks, so that the weights take at most this, such as `12GB`.
        ppl_ceiling: Remove the most blocks, as long as the measured perplexity is at most this, such as `12.5`, or
            `1.2x` for 1.2 times the dense model's. It needs a search.
        speedup: Remove the fewest blocks, so that generation is this many times as fast, such as 1.3. First the time of
            a token in each block, and in embeddings and head, is measured, which takes a few seconds.
        times: Take the time of a token in a block from this file of `shortstack bench`. The file needs figures of the
            model and of the model without some blocks. It needs `speedup`.
        plus: Keep the first four and the last two blocks, as published. By default this is on for models of at least 10
            blocks.
        objective: The cost to minimize, if the text has named sources: the `mean` of the sources, the `worst` source
            (by the increase relative to its dense loss), or weights such as `general=2,code=1`.
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
    times: Path | None = None
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
        scores: Choose by these scores: a scores.json from `shortstack score`, a block_order.csv (block numbers in the
            order of removal), or `published:[MODEL:]CRITERION`.
        criterion: Choose by this criterion of the scores. It can be left out if the scores have only one.
        strategy: How the blocks are chosen: `one-shot` removes those with the lowest scores, `contiguous` the run of
            adjacent blocks with the lowest sum.
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
        selection: Choose the blocks by measuring whole sets, as `shortstack search` does: `greedy`, `beam:4`,
            `evolution:20`, `swaps:10`, `gate:32`, `contiguous` or `one-shot`.
        rescore: Remove the block with the lowest score by this criterion, score the remaining blocks, and so on. It
            needs `selection="greedy"`.
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
    """The size of the curve, and how its sets are chosen.

    Attributes:
        selection: How the set of each size is chosen: `greedy`, `beam:4`, `gate:32`, `contiguous` or `one-shot`, as in
            `shortstack search`.
        most: The largest number of blocks to remove. By default it is half of the removable blocks.
        plus: Keep the first four and the last two blocks, as published. By default this is on for models of at least 10
            blocks.
        objective: The cost to minimize, if the text has named sources: the `mean` of the sources, the `worst` source
            (by the increase relative to its dense loss), or weights such as `general=2,code=1`.
    """

    selection: str = "greedy"
    most: int | None = None
    plus: bool | None = None
    objective: str | None = None


@dataclass(frozen=True)
class SearchOptions(Budget):
    """How many blocks are removed, and how the set of them is searched.

    Attributes:
        selection: The search method. `greedy` removes the block that costs least, measures again, and so on. `beam:4`
            keeps the four cheapest sets at each step. `evolution:20` changes sets by swaps for 20 generations,
            `swaps:10` does so for 10 generations from the set that `greedy` finds.
            `gate:32` measures the 32 sets that a quadratic model of gates on the blocks predicts to be the cheapest.
            `one-shot` takes the blocks that cost least alone, `contiguous` the cheapest run of adjacent blocks.
        rescore: Remove the block with the lowest score by this criterion, score the remaining blocks, and so on. It
            needs the selection `greedy`.
    """

    selection: str = "greedy"
    rescore: str | None = None


@dataclass(frozen=True)
class PruneOptions(Options):
    """How a pruned checkpoint is written.

    Attributes:
        verify: Load the result and compare bytes, config and logits with those of the original with the removed blocks
            skipped. If logits cannot be compared, this is reported.
        repair: Repair the cuts without training by this method, as `shortstack repair` does. It fits on the calibration
            windows, by default 128 windows of 256 tokens.
        repair_between: After each step of `rescore`, also repair the remaining model before it is scored again.
        force: Replace an existing output that shortstack made.
        allow_nonfinite: Copy tensors that hold NaN or infinity.
    """

    verify: bool = False
    repair: Method | None = None
    repair_between: bool = False
    force: bool = False
    allow_nonfinite: bool = False
