"""Why a set of blocks cannot go exactly: (config, depth, removed positions, tensor names) -> a reason, or None.

The config has every implied list written out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from shortstack.checkpoint.anatomy import FULL, LINEAR, Config, Expansion, Refusal
from shortstack.families.lists import gemma4_kinds
from shortstack.families.rewrites import ernie_interval, jamba_periods


def _left(depth: int, removed: Sequence[int]) -> list[int]:
    """Positions of the blocks that stay."""
    return sorted(set(range(depth)) - set(removed))


def only_the_last_blocks(reason: str, when: Callable[[Config], bool] = lambda _: True) -> Refusal:
    """Something depends on the block's number: only a suffix can be removed without changing the others."""

    def refuse(config: Config, depth: int, removed: Sequence[int], names: Collection[str]) -> str | None:
        suffix = list(range(depth - len(removed), depth))
        return f"{reason}: only the last blocks can be removed" if when(config) and list(removed) != suffix else None

    return refuse


def never_block_0(reason: str) -> Refusal:
    """The first block is built differently."""
    return lambda config, depth, removed, names: f"{reason}; block 0 must stay" if 0 in removed else None


def two_hybrid_blocks_stay(config: Config, depth: int, removed: Sequence[int], names: Collection[str]) -> str | None:
    """transformers ties the shared attention of a second hybrid block to the first, and fails without a second."""
    left = [i for i in _left(depth, removed) if config["layers_block_type"][i] == "hybrid"]
    return (
        "fewer than two hybrid blocks would stay, and transformers cannot load such a model" if len(left) < 2 else None
    )


def each_type_stays(key: str) -> Refusal:
    """The config class insists on one block of each type."""

    def refuse(config: Config, depth: int, removed: Sequence[int], names: Collection[str]) -> str | None:
        kinds = config[key]
        lost = {kinds[index] for index in removed} - {kinds[i] for i in _left(depth, removed)}
        return f"the model needs a block of each type, and no {sorted(lost)[0]} block would stay" if lost else None

    return refuse


def some_attention_stays(key: str = "layer_types", expand: Expansion | None = None) -> Refusal:
    """Without attention the model cannot keep the length of what it has generated: cached generation would fail.

    Args:
        key: the list of block types.
        expand: what gives it, where it is no entry of the config.
    """

    def refuse(config: Config, depth: int, removed: Sequence[int], names: Collection[str]) -> str | None:
        kinds = (expand(config, depth) if expand else config).get(key) or []
        left = [kinds[i] for i in _left(depth, removed)]
        if set(kinds) & _ATTENTION and not set(left) & _ATTENTION:
            return "no block with attention would stay, and cached generation needs one"
        return None

    return refuse


_ATTENTION = {FULL, "attention", "hybrid"}


def first_of(*refusals: Refusal) -> Refusal:
    """The first reason that applies."""

    def refuse(config: Config, depth: int, removed: Sequence[int], names: Collection[str]) -> str | None:
        return next((why for one in refusals if (why := one(config, depth, removed, names))), None)

    return refuse


def ernie_irregular(config: Config, depth: int, removed: Sequence[int], names: Collection[str]) -> str | None:
    """The experts that stay must again lie at an interval."""
    if ernie_interval(config, depth, _left(depth, removed)) is None:
        return "its config can only express experts at a regular interval, and the remaining ones would be irregular"
    return None


def jamba_irregular(config: Config, depth: int, removed: Sequence[int], names: Collection[str]) -> str | None:
    """Attention and experts that stay must again lie periodically."""
    found = jamba_periods(config, _left(depth, removed))
    if any(pair is None for pair, _ in found.values()):
        return "its config can only express periodic attention and experts, and the remaining ones would be irregular"
    if not found["attn"][1]:
        return "no attention block would stay, and cached generation needs one"
    return None


def indexers_keep_their_source(
    config: Config, depth: int, removed: Sequence[int], names: Collection[str]
) -> str | None:
    """A "shared" block takes over the tokens chosen by the "full" one before it."""
    source = None
    for index, kind in enumerate(config["indexer_types"]):
        if kind == "full":
            source = index
        elif index not in removed and source in removed:
            return f"block {index} uses the tokens that block {source} chooses"
    return None


def minimax_decays(config: Config, depth: int, removed: Sequence[int], names: Collection[str]) -> str | None:
    """The decay of linear attention depends on the block's number and the depth, unless it is stored."""
    linear = any(config["layer_types"][i] == LINEAR for i in _left(depth, removed))
    if linear and not any(name.endswith("self_attn.slope_rate") for name in names):
        return "the decay of its linear attention depends on the block's number, and the weights do not contain it"
    return None


def rwkv_rescaling(config: Config, depth: int, removed: Sequence[int], names: Collection[str]) -> str | None:
    """Every `rescale_every` blocks the weights are halved by the block's number."""
    if config.get("rescale_every", 6) > 0:
        return 'rescale_every ties weights to the block\'s number; set "rescale_every": 0 in config.json first'
    return None


def gemma4_last_and_shared(config: Config, depth: int, removed: Sequence[int], names: Collection[str]) -> str | None:
    """The last block is always computed with full attention; and as for Gemma 3n."""
    kinds = gemma4_kinds(config, depth)["layer_types"]
    kept = _left(depth, removed)
    if kinds[kept[-1]] != FULL:
        return f"the last block must attend to everything, and block {kept[-1]} does not"
    return shared_keys_keep_their_source(0)(config, depth, removed, names)


def shared_keys_keep_their_source(shared_by_default: int) -> Refusal:
    """The last `num_kv_shared_layers` blocks use keys and values of the last block of their type before those."""

    def refuse(config: Config, depth: int, removed: Sequence[int], names: Collection[str]) -> str | None:
        kinds = config["layer_types"]
        first = depth - config.get("num_kv_shared_layers", shared_by_default)
        for index in range(first, depth):
            source = max((i for i in range(first) if kinds[i] == kinds[index]), default=None)
            if index not in removed and source in removed:
                return f"block {index} uses the keys and values of block {source}"
        if first < depth and all(index in removed for index in range(first)):
            return "the remaining blocks use keys and values of blocks that would be removed"
        return None

    return refuse


def qwen4_ngrams(config: Config, depth: int, removed: Sequence[int], names: Collection[str]) -> str | None:
    """An n-gram table's size depends on how many blocks with one lie before it."""
    numbers = [number - 1 for number in config.get("ple_layer_ids") or []]
    lost = [index for index in numbers if index in removed]
    if lost and any(index > lost[0] and index not in removed for index in numbers):
        return f"the n-gram tables of later blocks depend on that of block {lost[0]}"
    return None


def zamba2_ordinals(config: Config, depth: int, removed: Sequence[int], names: Collection[str]) -> str | None:
    """The n-th hybrid block uses shared block n modulo `num_mem_blocks`, which must stay what it was."""
    kinds = config.get("layers_block_type") or []
    count = config.get("num_mem_blocks", 1)
    hybrid = [index for index in range(len(kinds)) if kinds[index] == "hybrid"]
    left = [index for index in hybrid if index not in removed]
    if hybrid and not left:
        return "no hybrid block would stay, and cached generation needs one"
    for new, index in enumerate(left):
        if hybrid.index(index) % count != new % count:
            return f"block {index} would use another of the {count} shared blocks"
    return None


def decoder_alone(config: Config, depth: int, removed: Sequence[int], names: Collection[str]) -> str | None:
    """As an encoder-decoder, or an encoder, the checkpoint is no causal language model."""
    if config.get("is_encoder_decoder", False):
        return "it is an encoder-decoder; only its decoder alone (is_encoder_decoder: false) is a causal model"
    return None
