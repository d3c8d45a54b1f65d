"""What few families need of their tensors beyond dropping and renumbering: moves, slices, a zero tensor.

Rows of the table of families point at these functions. They see names and shapes alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from shortstack.checkpoint.anatomy import Config, TensorEdits
from shortstack.checkpoint.headers import TensorInfo


def per_layer_embeddings(
    config: Config, prefix: str, depth: int, tensors: Mapping[str, TensorInfo], kept: Sequence[int]
) -> TensorEdits:
    """Gemma 3n and 4: one table holds a slice per block (columns), one projection makes one (rows)."""
    sliced = {}
    for name, tensor in tensors.items():
        for ending, dim in (("embed_tokens_per_layer.weight", 1), ("per_layer_model_projection.weight", 0)):
            if name.endswith(ending):
                width = tensor.shape[dim] // depth
                sliced[name] = (dim, _runs(kept, width))
    return TensorEdits(sliced=sliced)


def _runs(kept: Sequence[int], width: int) -> tuple[tuple[int, int], ...]:
    runs: list[tuple[int, int]] = []
    for index in kept:
        start, stop = index * width, (index + 1) * width
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], stop)
        else:
            runs.append((start, stop))
    return tuple(runs)


def zaya_first_router(
    config: Config, prefix: str, depth: int, tensors: Mapping[str, TensorInfo], kept: Sequence[int]
) -> TensorEdits:
    """The first block's router has no router before it, and no weight for its states."""
    unused = f"{prefix}{kept[0]}.mlp.gate.router_states_scale"
    return TensorEdits(dropped=frozenset({unused} & tensors.keys()) if kept[0] != 0 else frozenset())


def last_block_has_dense_bias(
    config: Config, prefix: str, depth: int, tensors: Mapping[str, TensorInfo], kept: Sequence[int]
) -> TensorEdits:
    """GPT-NeoX Japanese: the last block alone has a bias; a new last one gets zeros, as it had none."""
    owner = tensors.get(f"{prefix}{depth - 1}.attention.dense_bias")
    if owner is None or kept[-1] == depth - 1:
        return TensorEdits()
    return TensorEdits(zeros={f"{prefix}{len(kept) - 1}.attention.dense_bias": owner})


def zamba_shared_block(
    config: Config, prefix: str, depth: int, tensors: Mapping[str, TensorInfo], kept: Sequence[int]
) -> TensorEdits:
    """The shared attention is stored with the first hybrid block: it moves to the first that stays."""
    hybrid = _hybrid_blocks(prefix, tensors, ".shared_transf.", config)
    left = [index for index in hybrid if index in kept]
    if not hybrid or not left or left[0] == hybrid[0]:
        return TensorEdits()
    source, target = f"{prefix}{hybrid[0]}.shared_transf.", f"{prefix}{left[0]}.shared_transf."
    moved = [name for name in tensors if name.startswith(source) and name.replace(source, target, 1) not in tensors]
    new = f"{prefix}{kept.index(left[0])}.shared_transf."
    return TensorEdits(renamed={name: new + name.removeprefix(source) for name in moved})


def zamba2_shared_blocks(
    config: Config, prefix: str, depth: int, tensors: Mapping[str, TensorInfo], kept: Sequence[int]
) -> TensorEdits:
    """Each shared block is stored with its first user, with one adapter per hybrid block, by its ordinal."""
    tag = ".shared_transformer."
    hybrid = _hybrid_blocks(prefix, tensors, tag, config)
    left = [index for index in hybrid if index in kept]
    count = config.get("num_mem_blocks", 1)
    renamed, dropped = {}, set()
    for name in tensors:
        match = re.match(rf"{re.escape(prefix)}(\d+){re.escape(tag)}(.*)$", name)
        if not match:
            continue
        which, rest = hybrid.index(int(match.group(1))) % count, match.group(2)
        users = [index for ordinal, index in enumerate(left) if ordinal % count == which]
        adapter = re.match(r"(.*adapter_list\.)(\d+)\.(.*)$", rest)
        if adapter and users:
            owner = hybrid[int(adapter.group(2))]
            rest = f"{adapter.group(1)}{left.index(owner)}.{adapter.group(3)}" if owner in left else ""
        if users and rest:
            renamed[name] = f"{prefix}{kept.index(users[0])}{tag}{rest}"
        else:
            dropped.add(name)
    return TensorEdits(renamed=renamed, dropped=frozenset(dropped))


def _hybrid_blocks(prefix: str, tensors: Mapping[str, TensorInfo], tag: str, config: Config) -> list[int]:
    kinds = config.get("layers_block_type")
    if isinstance(kinds, list):
        return [index for index, kind in enumerate(kinds) if kind == "hybrid"]
    found = {int(name[len(prefix) :].partition(".")[0]) for name in tensors if name.startswith(prefix) and tag in name}
    return sorted(found)
