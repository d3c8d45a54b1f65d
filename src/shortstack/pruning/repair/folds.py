"""Repairs in the weights: which tensors of a checkpoint change, and how. One rounding each, from float64.

A state that is multiplied by a factor at a cut is what comes of dividing everything that later blocks add to it: all that
reads it does so behind a norm, which divides a common factor out. So no embedding changes, and a head tied to it neither.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shortstack.checkpoint.anatomy import Residual
from shortstack.checkpoint.reader import Checkpoint
from shortstack.pruning.repair.places import named

if TYPE_CHECKING:
    import torch

    from shortstack.pruning.repair.fit import Map

# A stored tensor in float64 -> what is stored in its place.
Change = Callable[["torch.Tensor"], "torch.Tensor"]


@dataclass(frozen=True)
class Fold:
    """A repair of the output of one block.

    Attributes:
        position: of the block; -1 for what goes into the first one.
        map: what is done to its output.
        projection_factor: what the block multiplies its MLP's output by before it is added.
    """

    position: int
    map: Map
    projection_factor: float = 1.0


def changes(checkpoint: Checkpoint, residual: Residual, folds: Sequence[Fold]) -> Mapping[str, Sequence[Change]]:
    """What is done to each tensor that changes, by name, in order."""
    found: dict[str, list[Change]] = {}
    for fold in folds:
        if fold.map.change_FD is None:
            continue
        for tensor in named(checkpoint, fold.position, residual.mlp):
            is_bias = tensor.name.endswith(".bias")
            edit = _bias_edit if is_bias else functools.partial(_weight_edit, transposed=residual.transposed)
            found.setdefault(tensor.name, []).append(functools.partial(edit, fold=fold))
    for block in range(checkpoint.depth):
        factor = block_factor(folds, block)
        if factor == 1.0:
            continue
        writers = residual.norms or (*residual.attention, *residual.mlp)
        for tensor in named(checkpoint, block, writers):
            one_plus = residual.one_plus and tensor.name.endswith(".weight")
            found.setdefault(tensor.name, []).append(
                functools.partial(_scaled, factor=factor, one=1.0 if one_plus else 0.0)
            )
        for tensor in named(checkpoint, block, residual.readers):
            if tensor.name.endswith(".weight"):
                found.setdefault(tensor.name, []).append(functools.partial(_scaled, factor=1 / factor, one=0.0))
    return found


def block_factor(folds: Sequence[Fold], block: int) -> float:
    """What everything is multiplied by that a block adds: one over the factors of all cuts before it."""
    return 1 / math.prod(fold.map.factor for fold in folds if fold.position < block)


def _scaled(stored: torch.Tensor, *, factor: float, one: float) -> torch.Tensor:
    return factor * (one + stored) - one


def _weight_edit(stored: torch.Tensor, *, fold: Fold, transposed: bool) -> torch.Tensor:
    """The last projection of an MLP, [..., outputs, inputs], or [inputs, outputs] where it is stored transposed."""
    import torch

    assert fold.map.change_FD is not None
    change = fold.map.change_FD
    if fold.map.features == "inner":
        added = change / fold.projection_factor
        return stored + (added if transposed else added.T)
    after = torch.eye(len(change), dtype=change.dtype) + change
    return stored @ after if transposed else after.T @ stored


def _bias_edit(stored: torch.Tensor, *, fold: Fold) -> torch.Tensor:
    change, offset = fold.map.change_FD, fold.map.offset_D
    if change is not None and fold.map.features == "moved":
        stored = stored + stored @ change
    return stored if offset is None else stored + offset / fold.projection_factor
