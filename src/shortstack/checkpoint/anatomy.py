"""The table of families: where blocks live, which config entries are per block, what cannot be shortened exactly.

The only place that knows model names. A family is a row; what no row can say is a small named function that the row
points at. All rules are pure functions of the raw config, tested against transformers' AutoConfig.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shortstack.errors import ShortstackError

Config = Mapping[str, Any]
# Given the config and the depth: the per-block lists that the config only implies, or why a removal is not exact.
ListRule = Callable[[Config, int], dict[str, list[Any]]]
RefusalRule = Callable[[Config, int, Sequence[int]], str | None]

# Lists that transformers reads in any family's config, one entry per block.
_GENERAL_LISTS = ("layer_types", "mlp_layer_types")


@dataclass(frozen=True)
class Family:
    """One row: how the checkpoints of one `model_type` are laid out.

    Attributes:
        model_type: the value in config.json.
        prefix: what stands before the block number in tensor names.
        counts: config entries that hold the number of blocks; those present are all rewritten.
        lists: config entries with one value per block, beyond the general ones.
        implied: lists that the config only implies by a rule; written out when it is not uniform.
        refusal: why a set of removed blocks is not exact, or None.
        embedding, head: names of the token embedding and of the output head.
        tied: whether head and embedding are one tensor when config.json does not say.
        buffers: last name parts of block tensors that are not parameters (masks, rotary tables in old checkpoints).
    """

    model_type: str
    prefix: str = "model.layers."
    counts: tuple[str, ...] = ("num_hidden_layers",)
    lists: tuple[str, ...] = ()
    implied: ListRule | None = None
    refusal: RefusalRule | None = None
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    tied: bool = False
    buffers: tuple[str, ...] = ("rotary_emb.inv_freq",)


def _sliding_after_max_window_layers(config: Config, depth: int) -> dict[str, list[Any]]:
    """Qwen2 and Qwen3: blocks from `max_window_layers` on attend within the window, when it is switched on."""
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window", False) else None
    first = config.get("max_window_layers", 28)
    kind = ["sliding_attention" if window is not None and i >= first else "full_attention" for i in range(depth)]
    return {"layer_types": kind}


def _every_second_full(_: Config, depth: int) -> dict[str, list[Any]]:
    """Gemma 2: window, full, window, full, ..."""
    return {"layer_types": ["full_attention" if i % 2 else "sliding_attention" for i in range(depth)]}


def _every_nth_full(config: Config, depth: int) -> dict[str, list[Any]]:
    """Gemma 3: every `sliding_window_pattern`-th block (6th by default) attends to everything."""
    period = config.get("sliding_window_pattern", 6)
    return {"layer_types": ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(depth)]}


def _scaled_by_block_index(config: Config, depth: int, removed: Sequence[int]) -> str | None:
    """GPT-2 may divide attention by the block number: then only the last blocks can go without changing the others."""
    suffix = list(range(depth - len(removed), depth))
    if config.get("scale_attn_by_inverse_layer_idx") and list(removed) != suffix:
        return "scale_attn_by_inverse_layer_idx ties attention to the block number: only the last blocks can be removed"
    return None


_ROWS = [
    *(
        Family(name)
        for name in (
            "arcee", "glm", "glm4", "granite", "llama", "ministral3", "mistral", "mixtral", "nemotron", "olmo", "olmo2",
            "olmoe", "persimmon", "phi", "phi3", "seed_oss", "stablelm",
        )
    ),
    Family("cohere", tied=True),
    Family("gemma", tied=True),
    Family("starcoder2", tied=True),
    Family("qwen2", implied=_sliding_after_max_window_layers),
    Family("qwen3", implied=_sliding_after_max_window_layers),
    Family("gemma2", tied=True, implied=_every_second_full),
    Family("gemma3_text", tied=True, implied=_every_nth_full),
    Family(
        "gpt2", counts=("n_layer", "num_hidden_layers"), refusal=_scaled_by_block_index,
        buffers=("attn.bias", "attn.masked_bias"), prefix="transformer.h.", embedding="transformer.wte.weight", tied=True,
    ),
    Family(
        "gpt_neox", prefix="gpt_neox.layers.", embedding="gpt_neox.embed_in.weight", head="embed_out.weight",
        buffers=("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
    ),
    Family("opt", prefix="model.decoder.layers.", embedding="model.decoder.embed_tokens.weight", tied=True),
    Family(
        "falcon", prefix="transformer.h.", counts=("num_hidden_layers", "n_layer"),
        embedding="transformer.word_embeddings.weight", tied=True,
    ),
]  # fmt: skip
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ROWS}


@dataclass(frozen=True)
class Anatomy:
    """A family's row applied to one checkpoint: the prefixes as they stand on its disk, and its depth."""

    family: Family
    prefix: str
    depth: int
    embedding: str
    head: str

    def block_of(self, tensor_name: str) -> int | None:
        """The block that a tensor belongs to (its position in this checkpoint), or None."""
        if not tensor_name.startswith(self.prefix):
            return None
        number, _, rest = tensor_name[len(self.prefix) :].partition(".")
        return int(number) if rest and number.isascii() and number.isdigit() else None

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


def anatomy_of(config: Config, tensor_names: Iterable[str], place: str) -> Anatomy:
    """Find the family of a checkpoint and check that config and tensors agree about its blocks.

    Args:
        config: the raw config.json.
        tensor_names: all names on disk.
        place: the checkpoint, as errors name it.

    Raises:
        ShortstackError: unknown family, no valid depth, or blocks missing or left over.
    """
    family = family_of(config, place)
    names = list(tensor_names)
    depth = depth_of(config, family, place)
    # Checkpoints of a bare base model lack the outermost name (`h.0.` for `transformer.h.0.`); both load.
    base = family.prefix.partition(".")[0] + "."
    stripped = not any(name.startswith(family.prefix) for name in names)
    prefix, embedding = family.prefix, family.embedding
    if stripped:
        prefix, embedding = prefix.removeprefix(base), embedding.removeprefix(base)
    anatomy = Anatomy(family, prefix, depth, embedding, family.head)
    found = {index for name in names if (index := anatomy.block_of(name)) is not None}
    if not found:
        raise ShortstackError(
            f"{place}: no tensor starts with {family.prefix!r}, where {family.model_type} keeps blocks"
        )
    missing = sorted(set(range(depth)) - found)
    extra = sorted(found - set(range(depth)))
    if missing:
        raise ShortstackError(
            f"{place}: config.json says {depth} blocks, but the weights lack block {ranges(missing)}",
            hint="download the checkpoint again, or correct the number in config.json",
        )
    if extra:
        raise ShortstackError(
            f"{place}: config.json says {depth} blocks, but the weights also hold block {ranges(extra)}",
            hint="correct the number of blocks in config.json, or drop those tensors",
        )
    return anatomy


def family_of(config: Config, place: str) -> Family:
    """The row of a config's `model_type`."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ShortstackError(f"{place}: config.json has no model_type", hint="is this a Hugging Face language model?")
    if model_type not in FAMILIES:
        raise ShortstackError(
            f"{place}: the family {model_type!r} is not in shortstack's table, so it may not shorten exactly",
            hint=f"known: {', '.join(sorted(FAMILIES))}; docs/adding-a-family.md shows how to add one",
        )
    return FAMILIES[model_type]


def depth_of(config: Config, family: Family, place: str) -> int:
    """The number of blocks that a config states."""
    for key in family.counts:
        if key in config:
            depth = config[key]
            if type(depth) is not int or depth < 1:
                raise ShortstackError(f"{place}: config.json: {key} is {depth!r}, expected a whole number >= 1")
            return depth
    raise ShortstackError(f"{place}: config.json lacks {family.counts[0]}, the number of blocks")


def is_tied(config: Config, family: Family) -> bool:
    """Whether the output head is the token embedding."""
    return bool(config.get("tie_word_embeddings", family.tied))


def per_block_lists(config: Config, family: Family, depth: int, place: str) -> dict[str, list[Any]]:
    """Every config entry with one value per block, written out in full where the config only implies it."""
    lists: dict[str, list[Any]] = {}
    for key in (*_GENERAL_LISTS, *family.lists):
        value = config.get(key)
        if isinstance(value, list):
            if len(value) != depth:
                raise ShortstackError(
                    f"{place}: config.json: {key} has {len(value)} entries for {depth} blocks",
                    hint="correct config.json: this checkpoint would not compute what it was trained to",
                )
            lists[key] = value
    if family.implied is not None:
        for key, value in family.implied(config, depth).items():
            lists.setdefault(key, value)
    return lists


def shortened_config(config: Config, anatomy: Anatomy, kept: Sequence[int], place: str) -> dict[str, Any]:
    """The config of the checkpoint that keeps the blocks at positions `kept`: a copy of the raw one, edited.

    Raises:
        ShortstackError: this set of blocks cannot be removed exactly from this family.
    """
    family, depth = anatomy.family, anatomy.depth
    if "quantization_config" in config:
        raise ShortstackError(
            f"{place}: is quantized", hint="prune the checkpoint it was made from, then quantize that"
        )
    removed = sorted(set(range(depth)) - set(kept))
    reason = family.refusal(config, depth, removed) if family.refusal and removed else None
    if reason:
        raise ShortstackError(f"{place}: removing block {ranges(removed)} is not exact: {reason}")
    edited = dict(config)
    if not removed:
        return edited
    edited.pop("auto_map", None)  # code is not copied, and the family's own class computes the same
    for key in family.counts:
        if key in edited:
            edited[key] = len(kept)
    for key, values in per_block_lists(config, family, depth, place).items():
        shorter = [values[index] for index in kept]
        # A list that the config only implied is needed unless the rule, applied to the new depth, says the same.
        implied = family.implied(edited, len(kept)).get(key) if family.implied and key not in config else None
        if implied != shorter:
            edited[key] = shorter
    return edited


def kv_bytes_per_token(config: Config, depth: int, element_bytes: int = 2) -> int | None:
    """Bytes of key-value cache per token at full attention, or None where the config does not say the heads."""
    heads = config.get("num_attention_heads", config.get("n_head"))
    hidden = config.get("hidden_size", config.get("n_embd"))
    if not heads or not hidden:
        return None
    head_dim = config.get("head_dim") or hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads
    return int(2 * depth * kv_heads * head_dim * element_bytes)


def max_positions(config: Config) -> int | None:
    """The longest sequence that the model takes, or None where the config does not limit it."""
    value = config.get("max_position_embeddings", config.get("n_positions"))
    return value if isinstance(value, int) and value > 0 else None


def ranges(numbers: Iterable[int]) -> str:
    """Whole numbers as a person writes them: `0-3, 7, 9-10`."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in parts)
