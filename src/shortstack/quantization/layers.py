"""Which layers of a checkpoint are quantized, in groups of what size, and which are left dense: from headers alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from shortstack.checkpoint.headers import TensorInfo
from shortstack.checkpoint.reader import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.quantization.schemes import Scheme


@dataclass(frozen=True)
class LayerChoice:
    """What is done with each kind of layer. A kind is a name within a block, such as `mlp.down_proj`.

    Attributes:
        groups: For each group size (0 for a whole row), the kinds of layers that are quantized with it.
        dense: The kinds of layers that are not quantized, each with the reason.
    """

    groups: dict[int, tuple[str, ...]]
    dense: dict[str, str] = field(default_factory=dict)

    def group_size(self, kind: str) -> int | None:
        """The group size of a kind of layer; None if it is not quantized."""
        return next((size for size, kinds in self.groups.items() if kind in kinds), None)

    def without(self, dense: dict[str, str]) -> LayerChoice:
        """The same choice, but these kinds of layers are not quantized."""
        groups = {size: tuple(kind for kind in kinds if kind not in dense) for size, kinds in self.groups.items()}
        return LayerChoice({size: kinds for size, kinds in groups.items() if kinds}, {**self.dense, **dense})


def chosen_layers(checkpoint: Checkpoint, scheme: Scheme, group_size: int | None = None) -> LayerChoice:
    """The matrices of the blocks, each with the largest group size that divides its inputs.

    Token embedding, output head and norms are never quantized.

    Args:
        checkpoint: what is to be quantized.
        scheme: how.
        group_size: this one and no other.

    Raises:
        ShortstackError: it is quantized already, a mixture of experts, or no layer fits.
    """
    refuse_unquantizable(checkpoint)
    sizes = scheme.with_group_size(group_size)
    groups: dict[int, list[str]] = {}
    dense: dict[str, str] = {}
    for kind, tensors in _matrices(checkpoint).items():
        columns = math.gcd(*(tensor.shape[1] for tensor in tensors))
        size = next((size for size in sizes if columns % size == 0), None) if sizes else 0
        if size is None:
            listed = " or ".join(map(str, sizes))
            dense[kind] = f"{columns} inputs are no whole number of groups of {listed}"
        else:
            groups.setdefault(size, []).append(kind)
    if not groups:
        reasons = "; ".join(f"{kind}: {why}" for kind, why in dense.items()) or "its blocks have no matrices"
        raise ShortstackError(
            f"{checkpoint.source}: no layer can be quantized to {scheme.name}: {reasons}",
            hint="leave --group-size out; the largest of 128, 64 and 32 that divides is then used"
            if group_size is not None
            else "--scheme W8A8 scales whole rows, of any length",
        )
    return LayerChoice({size: tuple(kinds) for size, kinds in sorted(groups.items(), reverse=True)}, dense)


def refuse_unquantizable(checkpoint: Checkpoint) -> None:
    """Refuse what no scheme takes.

    Raises:
        ShortstackError: it is quantized already, or a mixture of experts.
    """
    if "quantization_config" in checkpoint.config:
        raise ShortstackError(
            f"{checkpoint.source}: is quantized already", hint="quantize the checkpoint that it was made from"
        )
    expert = next((name for name in _matrices(checkpoint) if "experts" in name.split(".")), None)
    if expert is not None:
        raise ShortstackError(
            f"{checkpoint.source}: is a mixture of experts ({expert}), whose quantized experts transformers 5 cannot load",
            hint="export it to GGUF and quantize that with llama.cpp",
        )


def expected_nbytes(checkpoint: Checkpoint, scheme: Scheme, choice: LayerChoice) -> int:
    """Bytes of the tensors of the result, as far as they can be told: what is dense is stored in 16 bits."""
    total = 0
    for tensor in checkpoint.tensors.values():
        size = choice.group_size(kind_of(checkpoint, tensor) or "")
        if size is None:
            total += min(tensor.nbytes, 2 * tensor.numel)
        else:
            scales = tensor.shape[0] if size == 0 else tensor.numel // size
            total += (tensor.numel * scheme.bits + scales * scheme.scale_bits) // 8 + 16  # and its shape
    return total


def kind_of(checkpoint: Checkpoint, tensor: TensorInfo) -> str | None:
    """The kind of layer whose matrix a tensor is, or None."""
    name, anatomy = tensor.name, checkpoint.anatomy
    if anatomy.block_of(name) is None or len(tensor.shape) != 2 or not name.endswith(".weight"):
        return None
    return anatomy.within_block(name).removesuffix(".weight") if checkpoint.is_parameter(name) else None


def _matrices(checkpoint: Checkpoint) -> dict[str, list[TensorInfo]]:
    """The matrices of all blocks by kind."""
    found: dict[str, list[TensorInfo]] = {}
    for tensor in _of_blocks(checkpoint):
        kind = kind_of(checkpoint, tensor)
        if kind is not None:
            found.setdefault(kind, []).append(tensor)
    return found


def _of_blocks(checkpoint: Checkpoint) -> Iterable[TensorInfo]:
    return (tensor for block in checkpoint.blocks for tensor in block)
