"""Per-block lists that a config only implies by a rule, written out: (config, depth) -> lists by name."""

from __future__ import annotations

from typing import Any

from shortstack.checkpoint.anatomy import FULL, LINEAR, SLIDING, Config, Expansion


def periodic(
    period: int, *, key: str = "", hit: str = FULL, miss: str = SLIDING, first: bool = False, into: str = "layer_types"
) -> Expansion:
    """Every n-th block is of one type, all others of the other.

    Args:
        period: n, where the config does not say.
        key: the config entry that holds n.
        hit, miss: the types.
        first: whether block 0 begins the count with a hit; otherwise block n-1 is the first hit.
        into: the list's name.
    """

    def expand(config: Config, depth: int) -> dict[str, list[Any]]:
        n = config.get(key, period) if key else period
        if not isinstance(n, int) or n < 1:
            return {}  # transformers does not read such a rule either
        return {into: [hit if (i if first else i + 1) % n == 0 else miss for i in range(depth)]}

    return expand


def uniform(value: str, into: str = "layer_types") -> Expansion:
    """All blocks are of one type."""
    return lambda config, depth: {into: [value] * depth}


def leading_dense(dense: int, *, key: str = "", sparse: str = "sparse", first: str = "dense") -> Expansion:
    """The MLPs of the first blocks are dense, the others mixtures of experts."""

    def expand(config: Config, depth: int) -> dict[str, list[Any]]:
        count = config.get(key, dense) if key else dense
        return {"mlp_layer_types": [first if i < count else sparse for i in range(depth)]}

    return expand


def both(*expansions: Expansion) -> Expansion:
    """Several lists, each by its own rule."""

    def expand(config: Config, depth: int) -> dict[str, list[Any]]:
        return {name: values for one in expansions for name, values in one(config, depth).items()}

    return expand


def sliding_from_max_window_layers(window: int = 4096, first: int = 28, switch: bool = True) -> Expansion:
    """Blocks from `max_window_layers` on attend within the window, where there is one (and it is switched on)."""

    def expand(config: Config, depth: int) -> dict[str, list[Any]]:
        on = config.get("use_sliding_window", False) or not switch
        has_window = on and config.get("sliding_window", window) is not None
        start = config.get("max_window_layers", first)
        return {"layer_types": [SLIDING if has_window and i >= start else FULL for i in range(depth)]}

    return expand


def qwen2_moe_windows(config: Config, depth: int) -> dict[str, list[Any]]:
    """Every other block below `max_window_layers` attends within the window, when that is switched on."""
    on, last = config.get("use_sliding_window", False), config.get("max_window_layers", 28)
    return {"layer_types": [SLIDING if on and (i + 1) % 2 and i < last else FULL for i in range(depth)]}


def sliding_where_there_is_a_window(config: Config, depth: int) -> dict[str, list[Any]]:
    """All blocks attend within the window, or none does."""
    return {"layer_types": [SLIDING if config.get("sliding_window", 4096) is not None else FULL] * depth}


def _rope_flags(config: Config, depth: int) -> list[int]:
    """1 where a block has rotary positions: as the config lists them, else in all but every n-th."""
    interval = config.get("no_rope_layer_interval", 4)
    return config.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(depth)]


def smollm3_rope(config: Config, depth: int) -> dict[str, list[Any]]:
    """Every fourth block is without rotary positions; those attend within the window, where one is used."""
    rope = _rope_flags(config, depth)
    windowed = config.get("use_sliding_window", False) and config.get("sliding_window") is not None
    return {"no_rope_layers": rope, "layer_types": [SLIDING if windowed and not has else FULL for has in rope]}


def llama4_rope(config: Config, depth: int) -> dict[str, list[Any]]:
    """Every fourth block attends to everything and is without rotary positions; the others attend in chunks."""
    rope = _rope_flags(config, depth)
    return {"no_rope_layers": rope, "layer_types": ["chunked_attention" if has else FULL for has in rope]}


def first_and_every_sixth_full(config: Config, depth: int) -> dict[str, list[Any]]:
    """Block 0 and every sixth block attend to everything."""
    return {"layer_types": [FULL if i == 0 or (i + 1) % 6 == 0 else SLIDING for i in range(depth)]}


def lfm2_attention(config: Config, depth: int) -> dict[str, list[Any]]:
    """Attention in the blocks that `full_attn_idxs` names, convolution elsewhere."""
    named = config.get("full_attn_idxs")
    return {"layer_types": [FULL if named is None or i in named else "conv" for i in range(depth)]}


def cohere2_moe_windows(config: Config, depth: int) -> dict[str, list[Any]]:
    """The leading dense blocks follow a pattern of their own."""
    dense = config.get("first_k_dense_replace", 0)
    leading, rest = config.get("prefix_dense_sliding_window_pattern", 1), config.get("sliding_window_pattern", 4)
    kinds = [FULL if (i + 1) % leading == 0 else SLIDING for i in range(dense)]
    kinds += [FULL if (i + 1) % rest == 0 else SLIDING for i in range(depth - dense)]
    return {"layer_types": kinds, **leading_dense(dense)(config, depth)}


def exaone_windows(config: Config, depth: int) -> dict[str, list[Any]]:
    """Every n-th block attends to everything; without a window no rule is read."""
    if config.get("sliding_window", 4096) is None:
        return {}
    return periodic(4, key="sliding_window_pattern")(config, depth)


def axk2_experts(config: Config, depth: int) -> dict[str, list[Any]]:
    """Experts from `first_k_dense_replace` on, in every `moe_layer_freq`-th block."""
    dense, every = config.get("first_k_dense_replace", 1), config.get("moe_layer_freq", 1)
    kinds = ["sparse" if i >= dense and i % every == 0 else "dense" for i in range(depth)]
    return {"mlp_layer_types": kinds, "layer_types": ["deepseek_sparse_attention"] * depth}


def glm_dsa_indexers(config: Config, depth: int) -> dict[str, list[Any]]:
    """Which blocks choose tokens themselves ("full") and which take over the choice of the one before ("shared")."""
    pattern = config.get("index_topk_pattern")
    if pattern is not None:
        names = {"F": "full", "S": "shared"}
        return {"indexer_types": [names[c] for c in pattern] if isinstance(pattern, str) else list(pattern)}
    every, offset = max(config.get("index_topk_freq", 1), 1), config.get("index_skip_topk_offset", 2)
    return {"indexer_types": ["full" if max(i - offset + 1, 0) % every == 0 else "shared" for i in range(depth)]}


def hy_v4_indexers(config: Config, depth: int) -> dict[str, list[Any]]:
    """Block 0 and every fourth block after it choose tokens themselves."""
    return {"indexer_types": ["full" if i == 0 or (i - 1) % 4 == 0 else "shared" for i in range(depth)]}


def deepseek_v4_kinds(config: Config, depth: int) -> dict[str, list[Any]]:
    """Attention by compression ratio, and hashed experts in the first blocks."""
    ratios = config.get("compress_ratios")
    heavy, compressed = "heavily_compressed_attention", "compressed_sparse_attention"
    if ratios is not None:
        kinds = [{0: SLIDING, 4: compressed, 128: heavy}[ratio] for ratio in ratios]
    else:
        kinds = [heavy] * min(depth, 2) + [compressed if i % 2 else heavy for i in range(max(depth - 2, 0))]
    hashed = config.get("num_hash_layers")
    hashed = 3 if hashed is None else hashed
    mlp = ["hash_moe" if i < hashed else "moe" for i in range(depth)]
    return {"layer_types": kinds[:depth], "mlp_layer_types": mlp}


def kimi_linear_kinds(config: Config, depth: int) -> dict[str, list[Any]]:
    """Full attention in the blocks that `linear_attn_config` names (counted from 1), else in every fourth after 0."""
    nested = config.get("linear_attn_config") or {}
    if "full_attn_layers" in nested and "kda_layers" in nested:
        full = {number - 1 for number in nested["full_attn_layers"]}
        kinds = [FULL if i in full else LINEAR for i in range(depth)]
    else:
        kinds = [FULL if i and i % 4 == 0 else LINEAR for i in range(depth)]
    return {"layer_types": kinds, **leading_dense(1, key="first_k_dense_replace")(config, depth)}


def inkling_kinds(config: Config, depth: int) -> dict[str, list[Any]]:
    """Local attention in the blocks that `local_layer_ids` names, else in all but every sixth."""
    named = config.get("local_layer_ids")
    local = {i for i in range(depth) if (i + 1) % 6} if named is None else set(named)
    kinds = ["hybrid_sliding" if i in local else "hybrid" for i in range(depth)]
    return {"layer_types": kinds, **leading_dense(0, key="dense_mlp_idx")(config, depth)}


def minimax_m3_kinds(config: Config, depth: int) -> dict[str, list[Any]]:
    """Sparse attention and experts where per-block flags say so."""
    sparse = (config.get("sparse_attention_config") or {}).get("sparse_attention_freq")
    experts = config.get("moe_layer_freq")
    kinds = [FULL] * depth if sparse is None else ["minimax_m3_sparse" if flag else FULL for flag in sparse]
    mlp = ["sparse"] * depth if experts is None else ["sparse" if flag else "dense" for flag in experts]
    return {"layer_types": kinds, "mlp_layer_types": mlp}


def olmo_hybrid_kinds(config: Config, depth: int) -> dict[str, list[Any]]:
    """Full attention in every fourth block, and in the last one where there is no fourth."""
    kinds = [FULL if i % 4 == 3 else LINEAR for i in range(depth)]
    if FULL not in kinds:
        kinds[-1] = FULL
    return {"layer_types": kinds}


def laguna_kinds(config: Config, depth: int) -> dict[str, list[Any]]:
    """Full attention everywhere, experts from block 1 on, the same number of heads in every block."""
    heads = config.get("num_attention_heads", 48)
    mlp = leading_dense(1)(config, depth)
    return {"layer_types": [FULL] * depth, **mlp, "num_attention_heads_per_layer": [heads] * depth}


def gemma3n_kinds(config: Config, depth: int) -> dict[str, list[Any]]:
    """Every fifth block attends to everything; the first ten activate sparsely, where there are more than ten."""
    sparse = 10 if depth > 10 else 0
    width = config.get("intermediate_size", 16384)
    return {
        **periodic(5)(config, depth),
        "activation_sparsity_pattern": [0.95] * sparse + [0.0] * (depth - sparse),
        "intermediate_size": list(width) if isinstance(width, list) else [width] * depth,
    }


def gemma4_kinds(config: Config, depth: int) -> dict[str, list[Any]]:
    """Every sixth block attends to everything, and the last one always."""
    kinds = config.get("layer_types") or periodic(6)(config, depth)["layer_types"]
    return {"layer_types": [*kinds[:-1], FULL]}


def zamba_kinds(config: Config, depth: int) -> dict[str, list[Any]]:
    """Block 2 and then one of every `attn_layer_period` blocks has the shared attention."""
    period, offset = config.get("attn_layer_period", 6), config.get("attn_layer_offset", 4)
    rest = ["hybrid" if i % period == offset else LINEAR for i in range(depth - 3)]
    return {"layers_block_type": [LINEAR, LINEAR, "hybrid", *rest][:depth]}


def gpt_neo_attention(config: Config, depth: int) -> dict[str, list[Any]]:
    """`attention_types` says how often which types repeat."""
    types = config.get("attention_types") or [[["global", "local"], 12]]
    return {"attention_layers": [kind for kinds, times in types for _ in range(times) for kind in kinds]}


def nemotron_h_kinds(config: Config, depth: int) -> dict[str, list[Any]]:
    """One letter per block."""
    pattern = config.get("hybrid_override_pattern")
    names = {"M": LINEAR, "E": "moe", "*": FULL, "-": "mlp"}
    return {"layers_block_type": [names[letter] for letter in pattern]} if isinstance(pattern, str) else {}


def bamba_kinds(config: Config, depth: int) -> dict[str, list[Any]]:
    """Attention in the blocks that `attn_layer_indices` names. Not an entry of its config: for refusals alone."""
    named = config.get("attn_layer_indices") or ()
    return {"layers_block_type": [FULL if i in named else LINEAR for i in range(depth)]}


def recurrent_gemma_cycle(config: Config, depth: int) -> dict[str, list[Any]]:
    """`block_types` is repeated as often as needed. Not an entry of its config: for refusals alone."""
    cycle = config.get("block_types") or ["recurrent", "recurrent", "attention"]
    return {"layers_block_type": [cycle[index % len(cycle)] for index in range(depth)]}


def nemotron_h_depth(config: Config) -> int | None:
    """The length of its list or pattern of block types; `num_hidden_layers` is ignored by the model."""
    for key in ("layers_block_type", "layer_types", "hybrid_override_pattern"):
        if isinstance(config.get(key), (list, str)):
            return len(config[key])
    return None
