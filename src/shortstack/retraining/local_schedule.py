"""Which blocks of a pruned model are trained on their own, and for how many steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from shortstack.checkpoint.byte_copy import TensorCopy, same_bytes
from shortstack.checkpoint.headers import TensorInfo
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.formatting import ranges
from shortstack.errors import ShortstackError, UsageError
from shortstack.retraining.local_blocks import near_cuts, target_depths
from shortstack.retraining.run import Prepared, Request, Schedule

if TYPE_CHECKING:
    from shortstack.data.loaders import Dataset
    from shortstack.retraining.placement import Place

_DEFAULT_TOKENS = 1_000_000

States = Literal["auto", "memory", "disk"]


@dataclass(frozen=True)
class BlockSchedule(Schedule):
    """How long which blocks are trained; the learning rate's schedule is spread over the steps of one block.

    Attributes:
        dense: the model that was pruned.
        states: where hidden states lie.
        settings: which blocks are trained, and what is compared.
        kept: where the blocks of the pruned model stand in the dense one.
        shared: how many of the first blocks give to the bit what the dense model's give: they have nothing to learn.
        chosen: positions of the blocks that are trained.
        pass_steps: steps of one pass over the text.
    """

    dense: Checkpoint
    states: States
    settings: dict[str, Any]
    kept: list[int]
    shared: int
    chosen: list[int]
    pass_steps: int

    @property
    def block_steps(self) -> int:
        """Steps of each block."""
        return self.spread


LocalRun = Prepared[BlockSchedule]


def block_schedule(
    request: Request, place: Place, dataset: Dataset, *, dense: Checkpoint, states: States
) -> BlockSchedule:
    """The blocks around the cuts, each for some passes over the text.

    Raises:
        ShortstackError: there is less text than was requested, or the processes share one model.
    """
    if place.is_sharded:
        raise UsageError(
            "FSDP: has no effect on blocks that are trained one at a time", hint="use torchrun without FSDP"
        )
    checkpoint, hyperparameters = request.checkpoint, request.hyperparameters
    settings = hyperparameters.local or {}
    pass_steps = dataset.steps(hyperparameters.batch, epochs=None, tokens=_tokens(hyperparameters.tokens, dataset))
    block_steps = math.ceil(pass_steps * (hyperparameters.epochs or 1))
    kept = [dense.position_of(block) for block in checkpoint.original_blocks]
    shared = _shared_blocks(checkpoint, dense, kept)
    radius = settings["radius"]
    near = near_cuts(kept, dense.depth, None if radius == "all" else radius)
    chosen = [position for position in near if position >= shared]
    request.progress.say(
        f"{len(chosen)} of {checkpoint.depth} blocks are trained "
        f"({ranges([checkpoint.original_blocks[at] for at in chosen])}), {block_steps} steps each"
    )
    steps = block_steps * len(chosen)
    return BlockSchedule(steps, block_steps, dense, states, settings, kept, shared, chosen, pass_steps)


def _tokens(requested: int | None, dataset: Dataset) -> int:
    """Tokens of one pass over the text."""
    held = dataset.tokens_per_epoch
    if requested is not None and held is not None and requested > held:
        raise ShortstackError(
            f"--tokens {requested}: {dataset.described.get('source')} holds {held} tokens to train on",
            hint=f"--tokens {held}, or more text; --epochs N trains every block on the same text N times",
        )
    return requested or min(_DEFAULT_TOKENS, held or _DEFAULT_TOKENS)


def _shared_blocks(checkpoint: Checkpoint, dense: Checkpoint, kept: list[int]) -> int:
    pairs = [(checkpoint.outside_blocks, dense.outside_blocks)]
    pairs += zip(checkpoint.blocks, dense.blocks, strict=False)
    goals = target_depths(kept, dense.depth)
    for count, (ours, theirs) in enumerate(pairs):
        meets = count == 0 or goals[count - 1] == count
        if not meets or len(ours) != len(theirs) or not all(map(_same, ours, theirs)):
            return max(0, count - 1)
    return checkpoint.depth


def _same(ours: TensorInfo, theirs: TensorInfo) -> bool:
    shaped = (ours.name, ours.dtype, ours.shape) == (theirs.name, theirs.dtype, theirs.shape)
    return shaped and same_bytes(TensorCopy(ours, ours.name), TensorCopy(theirs, theirs.name))
