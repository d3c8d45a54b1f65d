"""What a checkpoint is made of: the record of its family, and that applied to it (depth, blocks on disk, lists).

A `Family` is one row of the table, which is in `families/` with its rules. All rules are pure functions of the raw config
(and of names and shapes on disk), so that pruning a known family imports neither torch nor transformers.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shortstack.checkpoint.headers import TensorInfo
from shortstack.checkpoint.wrapped_names import refuse_wrapped
from shortstack.common.formatting import ranges
from shortstack.errors import ShortstackError

Config = Mapping[str, Any]
# (config, depth) -> the per-block lists that the config implies
Expansion = Callable[[Config, int], dict[str, list[Any]]]
# (config as it was, depth before, kept positions) -> entries to set
Rewrite = Callable[[Config, int, Sequence[int]], dict[str, Any]]
# (config with every list written out, depth, removed positions, tensor names) -> why this is not exact, or None
Refusal = Callable[[Config, int, Sequence[int], Collection[str]], "str | None"]

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
# Lists that transformers reads in any family's config, one entry per block.
_GENERAL_LISTS = ("layer_types", "mlp_layer_types")
# Config entries that say how many multi-token-prediction blocks a checkpoint has.
MTP_COUNTS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "mtp_num_layers")
_MTP_NAME = re.compile(r"(^|\.)mtp(_\w+)?\.")


@dataclass(frozen=True)
class TensorEdits:
    """What happens to tensors that are not simply dropped with their block, or renumbered with it.

    Attributes:
        dropped: names on disk that are not written.
        renamed: name on disk -> name written, whatever became of its block.
        sliced: name on disk -> (dimension, runs of indices [start, stop) that are kept, in order).
        zeros: name written -> a tensor on disk whose dtype and shape it has.
    """

    dropped: frozenset[str] = frozenset()
    renamed: dict[str, str] = field(default_factory=dict)
    sliced: dict[str, tuple[int, tuple[tuple[int, int], ...]]] = field(default_factory=dict)
    zeros: dict[str, TensorInfo] = field(default_factory=dict)


# (config, prefix on disk, depth before, tensors on disk, kept positions) -> edits
TensorRule = Callable[[Config, str, int, Mapping[str, TensorInfo], Sequence[int]], TensorEdits]


@dataclass(frozen=True)
class Widths:
    """Of a family whose config states how many attention heads and MLP channels every block has: so that there can be fewer.

    Attributes:
        inner: the projections into the MLP's channels, by their names within a block.
        heads_divide_hidden: its config class refuses numbers of heads that do not divide `hidden_size`.
    """

    inner: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    heads_divide_hidden: bool = False


@dataclass(frozen=True)
class Residual:
    """Of a family whose blocks add to one stream of hidden states: what writes into it, by names within a block.

    A name stands for its `.weight` and `.bias`; `*` in it stands for an expert's number.

    Attributes:
        attention, mlp: the projections whose outputs are added.
        norms: norms behind these projections, whose weights take a factor in their place. Where there are some, no linear
            map can be folded into a projection.
        one_plus: those norms multiply by 1 + weight.
        readers: the projections that read the stream with no norm ahead.
        transposed: projections are stored as [inputs, outputs].
        refusal: why a checkpoint with this config is different, or None.
    """

    attention: tuple[str, ...] = ("self_attn.o_proj",)
    mlp: tuple[str, ...] = ("mlp.down_proj",)
    norms: tuple[str, ...] = ()
    one_plus: bool = False
    readers: tuple[str, ...] = ()
    transposed: bool = False
    refusal: Callable[[Config], str | None] | None = None


@dataclass(frozen=True)
class Family:
    """One row: how the checkpoints of one `model_type` are laid out.

    Attributes:
        model_type: the value in config.json.
        prefix: what stands before the block number in tensor names.
        counts: config entries that hold the number of blocks; those present are all rewritten.
        depth: gives the number of blocks where no entry holds it.
        lists: config entries with one value per block, beyond `layer_types` and `mlp_layer_types`.
        implied: lists that the config only implies by a rule; written out when it is not uniform.
        leading: entries that say of how many of the first blocks something holds, with transformers' default.
        trailing: the same of the last blocks.
        numbers: entries that list block numbers.
        numbers_from_1: entries that list block numbers counted from 1.
        rewrite: whatever else in the config depends on block numbers or on the depth.
        refusal: why a set of removed blocks is not exact, or None.
        tensors: what few families need of their tensors beyond dropping and renumbering.
        refused: why no block of this family can be removed exactly; empty for all others.
        nested: the config entry that holds the language model's own config, in a composite.
        embedding, head: names of the token embedding and of the output head ("" where the head is stored beside the
            embedding and is a tensor of its own, whatever the config says).
        other_names: other (prefix, embedding, head) at which transformers finds the same weights, too.
        embedding_rows: rows of the embedding beyond `vocab_size`.
        tied: whether head and embedding are one tensor when config.json does not say.
        buffers: last name parts of block tensors that are not parameters (masks, rotary tables in old checkpoints).
        resident: why scoring must hold the whole model and bypass blocks; empty where one block at a time does.
        carried: the keyword by which a block is given what the block before it returned beside hidden states.
        causal: a decoder-only causal language model; False for encoders and decoders of other models.
        widths: how its blocks are made narrower; None where they cannot be.
        residual: where a repair is folded into its blocks; None where that is not known.
    """

    model_type: str
    prefix: str = "model.layers."
    counts: tuple[str, ...] = ("num_hidden_layers",)
    depth: Callable[[Config], int | None] | None = None
    lists: tuple[str, ...] = ()
    implied: Expansion | None = None
    leading: Mapping[str, int] = field(default_factory=dict)
    trailing: Mapping[str, int] = field(default_factory=dict)
    numbers: tuple[str, ...] = ()
    numbers_from_1: tuple[str, ...] = ()
    rewrite: Rewrite | None = None
    refusal: Refusal | None = None
    tensors: TensorRule | None = None
    refused: str = ""
    nested: str = ""
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    other_names: tuple[tuple[str, str, str], ...] = ()
    embedding_rows: Callable[[Config], int] | None = None
    tied: bool = False
    buffers: tuple[str, ...] = ("rotary_emb.inv_freq",)
    resident: str = ""
    carried: str = ""
    causal: bool = True
    widths: Widths | None = None
    residual: Residual | None = None

    def text(self, config: Config) -> Config:
        """The language model's own config: a nested one in a composite."""
        nested = config.get(self.nested) if self.nested else None
        return nested if isinstance(nested, Mapping) else config


@dataclass(frozen=True)
class Anatomy:
    """A family's row applied to one checkpoint: the prefixes as its files have them, and its depth.

    Attributes:
        extra: multi-token-prediction blocks that are stored behind the model's own, at the numbers from `depth` on.
    """

    family: Family
    prefix: str
    depth: int
    embedding: str
    head: str
    extra: int = 0

    def block_of(self, tensor_name: str) -> int | None:
        """The block that a tensor belongs to (its position in this checkpoint), or None."""
        number = self._number_of(tensor_name)
        return number if number is not None and number < self.depth else None

    def within_block(self, tensor_name: str) -> str:
        """The name of a block's tensor inside the block, such as `self_attn.q_proj.weight`."""
        return tensor_name[len(self.prefix) :].partition(".")[2]

    def block_name(self, index: int, inner: str) -> str:
        """The full name of a tensor of block `index`."""
        return f"{self.prefix}{index}.{inner}"

    def is_buffer(self, tensor_name: str) -> bool:
        """Whether a block's tensor is a constant table and not a parameter."""
        if self.block_of(tensor_name) is None:
            return False
        inner = self.within_block(tensor_name)
        return any(inner == name or inner.endswith("." + name) for name in self.family.buffers)

    def predicts_further(self, tensor_name: str) -> bool:
        """Whether a tensor belongs to multi-token prediction: trained on the dense model's last hidden states."""
        number = self._number_of(tensor_name)
        return (number is not None and number >= self.depth) or bool(_MTP_NAME.search(tensor_name))

    def _number_of(self, tensor_name: str) -> int | None:
        if not tensor_name.startswith(self.prefix):
            return None
        number, _, rest = tensor_name[len(self.prefix) :].partition(".")
        return int(number) if rest and number.isascii() and number.isdigit() else None


def anatomy_of(config: Config, family: Family, tensor_names: Iterable[str], place: str) -> Anatomy:
    """Check that config and tensors of a checkpoint agree about its blocks, and say where they are.

    Args:
        config: the raw config.json.
        family: its row.
        tensor_names: all names on disk.
        place: the checkpoint, as errors name it.

    Raises:
        ShortstackError: no valid depth, or blocks missing or left over.
    """
    names = list(tensor_names)
    depth = depth_of(config, family, place)
    # Checkpoints of a bare base model lack the outermost name (`h.0.` for `transformer.h.0.`); both load.
    base = family.prefix.partition(".")[0] + "."
    bare = (family.prefix.removeprefix(base), family.embedding.removeprefix(base), family.head)
    layouts = ((family.prefix, family.embedding, family.head), *family.other_names, bare)
    prefix, embedding, head = next(
        (layout for layout in layouts if any(name.startswith(layout[0]) for name in names)), layouts[0]
    )
    refuse_wrapped(names, prefix, place)
    unlimited = Anatomy(family, prefix, 1 << 60, embedding, head)
    found = {index for name in names if (index := unlimited.block_of(name)) is not None}
    if not found:
        raise ShortstackError(
            f"{place}: no tensor starts with {family.prefix!r}, where {family.model_type} keeps blocks",
            hint="check that config.json belongs to the weights: the names are those of another model or an adapter",
        )
    missing = sorted(set(range(depth)) - found)
    extra = sorted(found - set(range(depth)))
    if missing:
        raise ShortstackError(
            f"{place}: config.json says {depth} blocks, but the weights lack block {ranges(missing)}",
            hint="download the checkpoint again, or correct the number in config.json",
        )
    text = family.text(config)
    announced = max((count for key in MTP_COUNTS if type(count := text.get(key)) is int), default=0)
    if extra and extra != list(range(depth, depth + announced)):
        raise ShortstackError(
            f"{place}: config.json says {depth} blocks, but the weights also hold block {ranges(extra)}",
            hint="correct the number of blocks in config.json, or drop those tensors",
        )
    return Anatomy(family, prefix, depth, embedding, head, len(extra))


def depth_of(config: Config, family: Family, place: str) -> int:
    """The number of blocks that a config states."""
    text = family.text(config)
    if family.depth is not None:
        with reading_rules(place, family):
            implied = family.depth(text)
        if implied:
            return implied
    for key in family.counts:
        if key in text:
            depth = text[key]
            if type(depth) is not int or depth < 1:
                raise ShortstackError(f"{place}: config.json: {key} is {depth!r}, expected a whole number >= 1")
            return depth
    raise ShortstackError(f"{place}: config.json lacks {family.counts[0]}, the number of blocks")


def is_tied(config: Config, family: Family) -> bool:
    """Whether the output head is the token embedding."""
    text = family.text(config)
    return bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", family.tied)))


def per_block_lists(config: Config, family: Family, depth: int, place: str) -> dict[str, list[Any]]:
    """Every config entry with one value per block, written out in full where the config only implies it.

    Raises:
        ShortstackError: a list is not of the model's depth.
    """
    lists: dict[str, list[Any]] = {}
    text = family.text(config)
    for key in (*_GENERAL_LISTS, *family.lists):
        value = text.get(key)
        if isinstance(value, list):
            lists[key] = _of_depth(value, key, depth, place)
    if family.implied is not None:
        with reading_rules(place, family):
            implied = family.implied(text, depth)
        for key, value in implied.items():
            lists.setdefault(key, _of_depth(value, key, depth, place))
    return lists


@contextlib.contextmanager
def reading_rules(place: str, family: Family) -> Iterator[None]:
    """Within, a rule of the family's row may meet entries that are not what it expects: an error that says so."""
    try:
        yield
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ShortstackError(
            f"{place}: config.json: its entries about the blocks of {family.model_type} cannot be read "
            f"({type(error).__name__}: {error})",
            hint="compare it with the config.json of the original model",
        ) from None


def _of_depth(value: list[Any], key: str, depth: int, place: str) -> list[Any]:
    if len(value) != depth:
        raise ShortstackError(
            f"{place}: config.json: {key} has {len(value)} entries for {depth} blocks",
            hint="correct config.json; with this one the model would not compute what it was trained for",
        )
    return value


def kv_bytes_per_token(config: Config, depth: int, element_bytes: int = 2) -> int | None:
    """Bytes of key-value cache per token at full attention, or None where the config does not say the heads."""
    heads = config.get("num_attention_heads", config.get("n_head"))
    hidden = config.get("hidden_size", config.get("n_embd"))
    if type(heads) is not int or type(hidden) is not int or heads < 1:
        return None
    head_dim = config.get("head_dim") or hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads
    if type(head_dim) is not int or type(kv_heads) is not int:
        return None
    return 2 * depth * kv_heads * head_dim * element_bytes


def max_positions(config: Config, family: Family) -> int | None:
    """The longest sequence that the model takes, or None where the config does not limit it."""
    text = family.text(config)
    value = text.get("max_position_embeddings", text.get("n_positions"))
    return value if isinstance(value, int) and value > 0 else None
