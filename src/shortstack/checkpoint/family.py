"""What a checkpoint asks of its family: the record that is one row of the table, and the kinds of rules that it has.

The table itself and the rules are in `families/`. All rules are pure functions of the raw config (and of names and
shapes on disk), so that pruning a known family imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shortstack.checkpoint.headers import TensorInfo

Config = Mapping[str, Any]
# (config, depth) -> the per-block lists that the config implies
Expansion = Callable[[Config, int], dict[str, list[Any]]]
# (config as it was, depth before, kept positions) -> entries to set
Rewrite = Callable[[Config, int, Sequence[int]], dict[str, Any]]
# (config with every list written out, depth, removed positions, tensor names) -> why this is not exact, or None
Refusal = Callable[[Config, int, Sequence[int], Collection[str]], "str | None"]

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"


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
        embedding_rows: rows of the embedding beyond `vocab_size`.
        tied: whether head and embedding are one tensor when config.json does not say.
        buffers: last name parts of block tensors that are not parameters (masks, rotary tables in old checkpoints).
        resident: why scoring must hold the whole model and bypass blocks; empty where one block at a time does.
        carried: the keyword by which a block is given what the block before it returned beside hidden states.
        causal: a decoder-only causal language model; False for encoders and decoders of other models.
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
    embedding_rows: Callable[[Config], int] | None = None
    tied: bool = False
    buffers: tuple[str, ...] = ("rotary_emb.inv_freq",)
    resident: str = ""
    carried: str = ""
    causal: bool = True

    def text(self, config: Config) -> Config:
        """The language model's own config: a nested one in a composite."""
        nested = config.get(self.nested) if self.nested else None
        return nested if isinstance(nested, Mapping) else config
