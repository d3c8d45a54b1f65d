"""Which heads and channels of each block stay, and the checkpoint without the others: its config and its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shortstack.artifacts.scores import CriterionScores
from shortstack.checkpoint.byte_copy import TensorCopy
from shortstack.checkpoint.drop_blocks import Cut, cut_blocks
from shortstack.checkpoint.reader import Checkpoint
from shortstack.pruning.width.shape import DOWN, KEY, OUTPUT, QUERY, VALUE, BlockShape, Width

# Importance of the units of one block by kind: `queries`, `kv_heads`, `channels`.
Importance = Mapping[str, Sequence[float]]
Runs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class UnitScores(CriterionScores):
    """Scores of blocks, and the importance of their units.

    Attributes:
        units: by the block's position in the checkpoint.
    """

    units: Mapping[int, Importance] = field(default_factory=dict)


@dataclass(frozen=True)
class KeptUnits:
    """The heads and channels of one block that stay, by their numbers in the checkpoint, rising.

    Attributes:
        kv_heads: key-value heads.
        queries: query heads; as many of each key-value head's.
        channels: of the MLP.
    """

    kv_heads: tuple[int, ...]
    queries: tuple[int, ...]
    channels: tuple[int, ...]


def kept_units(shape: BlockShape, width: Width, importance: Importance) -> KeptUnits:
    """The most important units of a block; of equal ones the first.

    A group's importance is the sum over its key-value head and its query heads.
    """
    queries, per_group = importance["queries"], shape.per_group
    groups = {kv: range(kv * per_group, (kv + 1) * per_group) for kv in range(shape.kv_heads)}
    of_groups = [importance["kv_heads"][kv] + sum(queries[head] for head in own) for kv, own in groups.items()]
    kv_heads = _largest(range(shape.kv_heads), of_groups, width.kv_heads)
    kept = tuple(head for kv in kv_heads for head in _largest(groups[kv], queries, width.per_group))
    return KeptUnits(kv_heads, kept, _largest(range(shape.channels), importance["channels"], width.channels))


def _largest(units: Iterable[int], importance: Sequence[float], number: int) -> tuple[int, ...]:
    return tuple(sorted(sorted(units, key=lambda unit: (-importance[unit], unit))[:number]))


def narrow_cut(checkpoint: Checkpoint, shape: BlockShape, width: Width, kept: Sequence[KeptUnits]) -> Cut:
    """The checkpoint with these heads and channels of each block alone."""
    whole = cut_blocks(checkpoint, range(checkpoint.depth))
    anatomy = checkpoint.anatomy
    copies = []
    for copy in whole.tensors:
        block = anatomy.block_of(copy.source.name)
        owner, _, last = anatomy.within_block(copy.source.name).rpartition(".") if block is not None else ("", "", "")
        sliced = None if block is None else _sliced(shape, kept[block], owner, is_bias=last == "bias")
        if sliced is not None and sliced[1] == ((0, copy.source.shape[sliced[0]]),):
            sliced = None
        copies.append(copy if sliced is None else dataclasses.replace(copy, sliced=sliced))
    return Cut(whole.kept, _config(checkpoint, whole.config, shape, width), tuple(copies))


def _sliced(shape: BlockShape, kept: KeptUnits, owner: str, *, is_bias: bool) -> tuple[int, Runs] | None:
    """(dimension, runs of its indices that stay) of a block's tensor; None where it stays whole."""
    if owner in (OUTPUT, DOWN):  # units are its columns; its bias has none
        if is_bias:
            return None
        return 1, _runs(kept.queries, shape.head_dim) if owner == OUTPUT else _runs(kept.channels, 1)
    if owner == QUERY:
        return 0, _runs(kept.queries, shape.head_dim)
    if owner in (KEY, VALUE):
        return 0, _runs(kept.kv_heads, shape.head_dim)
    return (0, _runs(kept.channels, 1)) if owner in shape.inner else None


def _runs(units: Sequence[int], size: int) -> Runs:
    """Runs of indices of units that are `size` indices each."""
    runs: list[tuple[int, int]] = []
    for unit in units:
        start = unit * size
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], start + size)
        else:
            runs.append((start, start + size))
    return tuple(runs)


def _config(checkpoint: Checkpoint, config: dict[str, Any], shape: BlockShape, width: Width) -> dict[str, Any]:
    """The config with the new numbers. `head_dim` is written out: else it would follow from the number of heads."""
    edited = dict(config)
    edited.pop("auto_map", None)  # code is not copied, and the family's own class computes the same
    family, inner = checkpoint.anatomy.family, edited
    if family.text(config) is not config:
        edited[family.nested] = inner = dict(family.text(config))
    if width.heads != shape.heads:
        inner |= {
            "num_attention_heads": width.heads,
            "num_key_value_heads": width.kv_heads,
            "head_dim": shape.head_dim,
        }
    inner["intermediate_size"] = width.channels
    return edited


def parameters_of(checkpoint: Checkpoint, copies: Iterable[TensorCopy]) -> int:
    """Number of parameters of what is written."""
    return sum(copy.numel for copy in copies if checkpoint.is_parameter(copy.source.name))
