"""Where a pruned checkpoint can be repaired: its cuts, found by its history, and the tensors that a repair is folded into."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from shortstack.checkpoint.anatomy import Residual
from shortstack.checkpoint.headers import TensorInfo
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.formatting import named_blocks
from shortstack.errors import ShortstackError

_INSTEAD = "retrain it instead: shortstack retrain lora, or retrain distill --teacher DENSE"


@dataclass(frozen=True)
class Place:
    """A block of the pruned checkpoint whose output is repaired.

    Attributes:
        position: of the block in the pruned checkpoint; -1 for what goes into its first block.
        block: its number in the original model; None for what goes into the first one.
        target: the dense model's block whose input the output should be; its depth for what leaves the last one.
        removed: the cut behind the block, by numbers of the original model; () where there is none.
        is_last: no block of the pruned checkpoint comes after it.
    """

    position: int
    block: int | None
    target: int
    removed: tuple[int, ...]
    is_last: bool

    @property
    def name(self) -> str:
        """What a person reads."""
        return named_blocks(self.removed) if self.removed else f"behind: block {self.block}"


def residual_of(checkpoint: Checkpoint) -> Residual:
    """Where the family's row says that a repair can be folded.

    Raises:
        ShortstackError: it does not, this config is different, or the blocks of this model cannot be run one at a time.
    """
    family = checkpoint.anatomy.family
    reason = None
    if family.resident:
        reason = f"its blocks cannot be run one at a time: {family.resident}"
    elif family.residual is None:
        reason = "the table of families does not name what its blocks add to hidden states"
    elif family.residual.refusal is not None:
        reason = family.residual.refusal(family.text(checkpoint.config))
    if reason or family.residual is None:
        raise ShortstackError(
            f"{checkpoint.source}: a repair cannot be folded into {family.model_type} models: {reason}", hint=_INSTEAD
        )
    for block in range(checkpoint.depth):
        for names in (family.residual.attention, family.residual.mlp):
            if not named(checkpoint, block, family.residual.norms or names):
                raise ShortstackError(
                    f"{checkpoint.source}: block {block} has no {names[0]}, into which a repair of {family.model_type} "
                    "models is folded",
                    hint=_INSTEAD,
                )
    return family.residual


def named(checkpoint: Checkpoint, block: int, names: Sequence[str]) -> list[TensorInfo]:
    """The tensors of a block that some names of a family's row stand for."""
    patterns = [re.escape(name).replace(r"\*", "[0-9]+") for name in names]
    pattern = re.compile(rf"({'|'.join(patterns)})\.(weight|bias)")
    within = checkpoint.anatomy.within_block
    return [tensor for tensor in checkpoint.blocks[block] if names and pattern.fullmatch(within(tensor.name))]


def places_of(dense: Checkpoint, pruned: Checkpoint, behind: int) -> list[Place]:
    """The blocks whose outputs are repaired, in order: the one before each cut, and some behind it.

    Args:
        dense: the model before.
        pruned: the model without some of its blocks.
        behind: how many blocks behind each cut are repaired, too.
    """
    kept = [dense.position_of(block) for block in pruned.original_blocks]
    ends = [*kept, dense.depth]
    found, left = [], 0
    for position in range(-1, pruned.depth):
        first = kept[position] + 1 if position >= 0 else 0
        target = ends[position + 1]
        removed = tuple(dense.original_blocks[block] for block in range(first, target))
        left = behind if removed else left - 1
        if removed or left >= 0 <= position:
            block = pruned.original_blocks[position] if position >= 0 else None
            found.append(Place(position, block, target, removed, position == pruned.depth - 1))
    return found
