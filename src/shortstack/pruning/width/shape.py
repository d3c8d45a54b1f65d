"""What a block's width is made of, and how much of it goes for a ratio: numbers from headers and config alone."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NoReturn

from shortstack.checkpoint.headers import TensorInfo
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.formatting import count
from shortstack.errors import ShortstackError, UsageError
from shortstack.families.table import FAMILIES
from shortstack.pruning.budget import parse_amount
from shortstack.pruning.width.options import WidthChoice

QUERY, KEY, VALUE, OUTPUT, DOWN = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj",
)  # fmt: skip


@dataclass(frozen=True)
class BlockShape:
    """The width of every block of a checkpoint.

    Attributes:
        blocks: how many there are.
        hidden: width of the hidden states.
        heads, kv_heads: attention heads that ask, and heads of keys and values.
        head_dim: width of one.
        channels: width of the MLP.
        inner: the MLP's projections into the channels.
        per_query, per_kv, per_channel: parameters of one of them, in one block.
        heads_divide_hidden: other numbers of heads are refused by the family's config class.
    """

    blocks: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    channels: int
    inner: tuple[str, ...]
    per_query: int
    per_kv: int
    per_channel: int
    heads_divide_hidden: bool

    @property
    def per_group(self) -> int:
        """Query heads of each key-value head."""
        return self.heads // self.kv_heads

    @property
    def whole(self) -> Width:
        """All of it."""
        return Width(self.kv_heads, self.per_group, self.channels)

    def removed(self, width: Width) -> int:
        """Parameters that all blocks together lose."""
        return self.blocks * (self._of_attention(width) + self.per_channel * (self.channels - width.channels))

    def imbalance(self, width: Width) -> float:
        """How far the share of attention that goes is from the share of channels that goes."""
        attention = self.per_query * self.heads + self.per_kv * self.kv_heads
        return abs(self._of_attention(width) / attention - (1 - width.channels / self.channels))

    def _of_attention(self, width: Width) -> int:
        return self.per_query * (self.heads - width.heads) + self.per_kv * (self.kv_heads - width.kv_heads)


@dataclass(frozen=True)
class Width:
    """How much of every block stays.

    Attributes:
        kv_heads: key-value heads.
        per_group: query heads of each.
        channels: of the MLP.
    """

    kv_heads: int
    per_group: int
    channels: int

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.kv_heads * self.per_group


def shape_of(checkpoint: Checkpoint) -> BlockShape:
    """What the blocks of a checkpoint are made of.

    Raises:
        ShortstackError: its blocks cannot be made narrower so that the config can say it; says why.
    """
    source, family = checkpoint.source, checkpoint.anatomy.family
    if family.widths is None:
        known = ", ".join(sorted(name for name, row in FAMILIES.items() if row.widths is not None))
        raise ShortstackError(
            f"{source}: blocks of {family.model_type} cannot be made narrower; supported are {known}",
            hint="shortstack prune removes whole blocks",
        )
    if "quantization_config" in checkpoint.config:
        raise ShortstackError(
            f"{source}: is quantized; heads and channels are chosen by gradients of full-precision weights",
            hint="prune the checkpoint before quantization, and quantize the result",
        )
    if any(checkpoint.anatomy.predicts_further(name) for name in checkpoint.tensors):
        raise ShortstackError(
            f"{source}: has multi-token-prediction blocks, which would not fit narrower blocks",
            hint="shortstack prune removes whole blocks",
        )
    tensors = _alike(checkpoint)
    return _checked(checkpoint, tensors, family.widths.inner, family.widths.heads_divide_hidden)


def _alike(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    """The tensors of a block by their names in it; those of all others have the same shapes."""
    within = checkpoint.anatomy.within_block
    first, *others = [{within(tensor.name): tensor for tensor in block} for block in checkpoint.blocks]
    for number, block in zip(checkpoint.original_blocks[1:], others, strict=True):
        for name in sorted(first.keys() | block.keys()):
            shapes = [tensors[name].shape if name in tensors else None for tensors in (first, block)]
            if shapes[0] != shapes[1]:
                raise ShortstackError(
                    f"{checkpoint.source}: {name} is {_shown(shapes[1])} in block {number}, {_shown(shapes[0])} in the "
                    "first; the config has one width for all blocks",
                    hint="shortstack prune removes whole blocks",
                )
    return first


def _shown(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))


def _stated(checkpoint: Checkpoint) -> tuple[int, int, int]:
    """(query heads, key-value heads, channels) of every block, as the config states them."""
    text = checkpoint.text_config
    heads = text.get("num_attention_heads")
    kv_heads = heads if text.get("num_key_value_heads") is None else text["num_key_value_heads"]
    stated = {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": text.get("intermediate_size"),
    }
    numbers = [number for number in stated.values() if type(number) is int and number >= 1]
    if len(numbers) < len(stated):
        found = ", ".join(f"{key} is {value!r}" for key, value in stated.items())
        raise ShortstackError(
            f"{checkpoint.source}: config.json: {found}; expected whole numbers",
            hint="compare it with the config.json of the original model",
        )
    return numbers[0], numbers[1], numbers[2]


def _checked(
    checkpoint: Checkpoint, tensors: dict[str, TensorInfo], inner: tuple[str, ...], heads_divide_hidden: bool
) -> BlockShape:
    source = checkpoint.source
    hidden = checkpoint.tensors[checkpoint.anatomy.embedding].shape[1]
    heads, kv_heads, channels = _stated(checkpoint)
    rows = {name: tensors[f"{name}.weight"].shape for name in _matrices(inner) if f"{name}.weight" in tensors}
    head_dim = rows.get(KEY, (0,))[0] // kv_heads
    expected = {
        QUERY: (heads * head_dim, hidden), KEY: (kv_heads * head_dim, hidden), VALUE: (kv_heads * head_dim, hidden),
        OUTPUT: (hidden, heads * head_dim), **{name: (channels, hidden) for name in inner}, DOWN: (hidden, channels),
    }  # fmt: skip
    for name, shape in expected.items():
        if rows.get(name) != shape or heads % kv_heads:
            raise ShortstackError(
                f"{source}: {name} is {_shown(rows.get(name))}, {list(shape)} follows from config.json",
                hint="config.json and the weights do not belong together, or the projections are fused",
            )
    _refuse_others(checkpoint, tensors, expected, (hidden, head_dim))
    biased = {name: f"{name}.bias" in tensors for name in expected}
    return BlockShape(
        checkpoint.depth, hidden, heads, kv_heads, head_dim, channels, inner,
        per_query=head_dim * (2 * hidden + biased[QUERY]),
        per_kv=head_dim * (2 * hidden + biased[KEY] + biased[VALUE]),
        per_channel=sum(hidden + biased[name] for name in inner) + hidden,
        heads_divide_hidden=heads_divide_hidden,
    )  # fmt: skip


def _matrices(inner: tuple[str, ...]) -> tuple[str, ...]:
    return (QUERY, KEY, VALUE, OUTPUT, *inner, DOWN)


def _refuse_others(
    checkpoint: Checkpoint, tensors: dict[str, TensorInfo], known: Collection[str], lengths: tuple[int, int]
) -> None:
    """Refuse a tensor of which it is not known what it becomes; norms of the hidden states or of one head stay whole."""
    for name, tensor in tensors.items():
        owner, _, last = name.rpartition(".")
        if (owner in known and last in ("weight", "bias")) or checkpoint.anatomy.is_buffer(tensor.name):
            continue
        if "norm" not in owner or tensor.shape not in [(length,) for length in lengths]:
            raise ShortstackError(
                f"{checkpoint.source}: {tensor.name}, {list(tensor.shape)}, cannot be put into a narrower block",
                hint="shortstack prune removes whole blocks",
            )


def chosen_width(shape: BlockShape, parameters: int, choice: WidthChoice, source: str) -> Width:
    """How much of every block stays.

    With `ratio` the most that it allows, with `params` what is nearest. Of the numbers of heads that come as near as channels
    can bring them, the one whose share is nearest to the share of channels, as published.

    Args:
        shape: of the blocks.
        parameters: of the model.
        choice: how much goes.
        source: the checkpoint, as errors name it.

    Raises:
        ShortstackError: no head or no channel would be left, or nothing would go.
    """
    target = _target(parameters, choice)
    attention, channels = _attention(shape, choice), _channels(shape, choice)
    most = max(shape.removed(Width(kv, per_group, channels[0])) for kv, per_group in attention)
    if most == 0:
        _refuse_whole(shape, choice, source)
    if target >= _everything(shape, choice, most):
        _refuse_too_much(parameters, choice, most, source)
    fitting = [
        width
        for kv, per_group in attention
        if (width := _nearest(shape, [Width(kv, per_group, kept) for kept in channels], target, choice)) is not None
    ]
    step = 0 if choice.only is not None else shape.blocks * shape.per_channel * choice.multiple_of
    gaps = {width: abs(target - shape.removed(width)) for width in fitting}
    near = [width for width in fitting if gaps[width] <= min(gaps.values()) + step]
    chosen = min(near, key=lambda width: (shape.imbalance(width) if step else 0, gaps[width], -width.channels))
    if chosen == shape.whole:
        smallest = min(
            removed
            for kv, per_group in attention
            for kept in channels
            if (removed := shape.removed(Width(kv, per_group, kept))) > 0
        )
        raise UsageError(
            f"{source}: nothing would be removed: the least that can be removed is {count(smallest)} of {count(parameters)} "
            "parameters",
            hint=f"--ratio {_up(smallest / parameters)}",
        )
    return chosen


def _target(parameters: int, choice: WidthChoice) -> float:
    """How many parameters are to go."""
    if (choice.ratio is None) == (choice.params is None):
        found = "none" if choice.ratio is None else "both"
        raise UsageError(f"give one of --ratio and --params (found {found})", hint="such as --ratio 0.2")
    if choice.ratio is not None:
        return choice.ratio * parameters
    target = parse_amount(choice.params or "")
    if target >= parameters:
        raise UsageError(
            f"--params {choice.params}: the model has {count(parameters)} parameters", hint="give a smaller number"
        )
    return float(parameters - target)


def _attention(shape: BlockShape, choice: WidthChoice) -> list[tuple[int, int]]:
    """(key-value heads, query heads of each) that may stay."""
    whole = (shape.kv_heads, shape.per_group)
    if choice.only == "mlp":
        return [whole]
    if choice.head_unit == "kv-groups":
        found = [(kv, shape.per_group) for kv in range(1, shape.kv_heads + 1)]
    else:
        found = [(shape.kv_heads, per_group) for per_group in range(1, shape.per_group + 1)]
    allowed = [pair for pair in found if not (shape.heads_divide_hidden and shape.hidden % (pair[0] * pair[1]))]
    return list(dict.fromkeys([*allowed, whole]))


def _channels(shape: BlockShape, choice: WidthChoice) -> list[int]:
    """Numbers of channels that may stay, rising."""
    if choice.only == "heads":
        return [shape.channels]
    return list(dict.fromkeys([*range(choice.multiple_of, shape.channels + 1, choice.multiple_of), shape.channels]))


def _everything(shape: BlockShape, choice: WidthChoice, most: int) -> int:
    """Parameters that cannot go, because no head or no channel would be left; `most` of them can."""
    if choice.only == "heads":
        return shape.removed(Width(0 if choice.head_unit == "kv-groups" else shape.kv_heads, 0, shape.channels))
    if choice.only == "mlp":
        return shape.removed(Width(shape.kv_heads, shape.per_group, 0))
    return most + shape.blocks * shape.per_channel


def _nearest(shape: BlockShape, rising: Sequence[Width], target: float, choice: WidthChoice) -> Width | None:
    """Of these, what removes the most within the ratio, or what is nearest to the number of parameters."""
    if choice.ratio is None:
        return min(rising, key=lambda width: abs(shape.removed(width) - target))
    return next((width for width in rising if shape.removed(width) <= target + 1e-9), None)


def _refuse_whole(shape: BlockShape, choice: WidthChoice, source: str) -> NoReturn:
    """Nothing can be removed at all."""
    if choice.only != "heads":
        raise ShortstackError(
            f"{source}: --multiple-of {choice.multiple_of}: a block has {shape.channels} channels; no head is removable",
            hint="give a smaller --multiple-of",
        )
    if choice.head_unit == "query-heads":
        reasons = {"each key-value head has one query head": shape.per_group == 1}
        hint = "--head-unit kv-groups, or --only mlp"
    else:
        reasons = {"it has one key-value head": shape.kv_heads == 1}
        hint = "--head-unit query-heads, or --only mlp"
    why = next((reason for reason, holds in reasons.items() if holds), "no smaller number of heads divides hidden_size")
    raise ShortstackError(f"{source}: no head can be removed: {why}", hint=hint)


def _refuse_too_much(parameters: int, choice: WidthChoice, most: int, source: str) -> NoReturn:
    """No head or no channel would be left."""
    asked = f"--ratio {choice.ratio}" if choice.ratio is not None else f"--params {choice.params}"
    what = {"mlp": "no channel", "heads": "no head", None: "no head or no channel"}[choice.only]
    least = f"{count(parameters - most)} parameters stay in any case"
    hint = f"--ratio {_down(most / parameters)}" if choice.ratio is not None else f"--params {parameters - most}"
    raise ShortstackError(
        f"{source}: {asked} would leave {what} in a block: at most {most / parameters:.1%} of the parameters can be removed "
        f"({least})",
        hint=f"{hint} at most" if choice.ratio is not None else f"{hint} at least",
    )


def _down(share: float) -> str:
    return f"{math.floor(share * 10_000) / 10_000:g}"


def _up(share: float) -> str:
    return f"{math.ceil(share * 10_000) / 10_000:g}"
