"""Config entries that hold block numbers or counts, re-derived for the blocks that stay.

(config as it was, depth before, kept positions) -> entries to set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from shortstack.checkpoint.anatomy import Config, Rewrite
from shortstack.checkpoint.renumber_names import renumbered
from shortstack.families.lists import gpt_neo_attention, recurrent_gemma_cycle


def qwen_moe_experts(default_step: int = 1) -> Rewrite:
    """Experts in every `decoder_sparse_step`-th block but `mlp_only_layers`: name the dense blocks outright."""

    def rewrite(config: Config, depth: int, kept: Sequence[int]) -> dict[str, Any]:
        step, dense = config.get("decoder_sparse_step", default_step), config.get("mlp_only_layers") or []
        experts = config.get("num_experts", 1)

        def sparse(index: int) -> bool:
            return index not in dense and experts > 0 and (index + 1) % step == 0

        if step == 1 and not dense:
            return {}
        return {"mlp_only_layers": [i for i, old in enumerate(kept) if not sparse(old)], "decoder_sparse_step": 1}

    return rewrite


def llama4_experts(config: Config, depth: int, kept: Sequence[int]) -> dict[str, Any]:
    """Experts in the blocks that `moe_layers` names, else in every `interleave_moe_layer_step`-th."""
    step = config.get("interleave_moe_layer_step", 1)
    named = config.get("moe_layers")
    return {"moe_layers": renumbered(list(range(step - 1, depth, step)) if named is None else named, kept)}


def ernie_experts(config: Config, depth: int, kept: Sequence[int]) -> dict[str, Any]:
    """Experts from a first to a last block at an interval: the smallest rule that gives those that stay."""
    found = ernie_interval(config, depth, kept)
    keys = ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval")
    return dict(zip(keys, found, strict=True)) if found else {}


def ernie_interval(config: Config, depth: int, kept: Sequence[int]) -> tuple[int, int, int] | None:
    """(start, end, interval) that give the blocks with experts among those that stay; None where nothing does."""
    start, every = config.get("moe_layer_start_index", 1), config.get("moe_layer_interval", 1)
    end = config.get("moe_layer_end_index", -1)
    last = depth - 1 if end == -1 else end
    flags = [(i + 1) % every == 0 and start <= i <= last for i in kept]
    chosen = [index for index, flag in enumerate(flags) if flag]
    if not chosen:
        return None
    for step in range(1, len(flags) + 1):
        if [(i + 1) % step == 0 and chosen[0] <= i <= chosen[-1] for i in range(len(flags))] == flags:
            return chosen[0], chosen[-1], step
    return None


def jamba_kinds(config: Config, depth: int, kept: Sequence[int]) -> dict[str, Any]:
    """Attention and experts at (period, offset) pairs: those that give the blocks that stay."""
    found: dict[str, Any] = {}
    for name, (pair, _) in jamba_periods(config, kept).items():
        if pair is not None:
            found |= {f"{name}_layer_period": pair[0], f"{name}_layer_offset": pair[1]}
    return found


def jamba_periods(config: Config, kept: Sequence[int]) -> dict[str, tuple[tuple[int, int] | None, bool]]:
    """For attention and experts: (period, offset) of those that stay, or None where they are not periodic; any left?"""
    found = {}
    for name, period, offset in (("attn", 8, 4), ("expert", 2, 1)):
        n, at = config.get(f"{name}_layer_period", period), config.get(f"{name}_layer_offset", offset)
        flags = [index % n == at for index in kept]
        found[name] = (_as_period(flags), any(flags))
    return found


def _as_period(flags: Sequence[bool]) -> tuple[int, int] | None:
    for period in range(1, 2 * len(flags) + 1):
        for offset in range(period):
            if [index % period == offset for index in range(len(flags))] == list(flags):
                return period, offset
    return None


def recurrent_gemma_kinds(config: Config, depth: int, kept: Sequence[int]) -> dict[str, Any]:
    """`block_types` is repeated as often as needed: written out once per block."""
    kinds = recurrent_gemma_cycle(config, depth)["layers_block_type"]
    return {"block_types": [kinds[index] for index in kept]}


def minicpm3_residual_scale(config: Config, depth: int, kept: Sequence[int]) -> dict[str, Any]:
    """Residuals are scaled by scale_depth / sqrt(number of blocks), which must stay what it was."""
    scale = config.get("scale_depth", 1.4)
    if scale is None:
        scale = math.sqrt(depth)
    return {"scale_depth": scale * math.sqrt(len(kept) / depth)}


def longcat_caches(config: Config, depth: int, kept: Sequence[int]) -> dict[str, Any]:
    """Each block has two attentions; `num_hidden_layers` counts those."""
    return {"num_hidden_layers": 2 * len(kept)}


def gpt_neo_types(config: Config, depth: int, kept: Sequence[int]) -> dict[str, Any]:
    """`attention_types` with one entry per block."""
    layers = gpt_neo_attention(config, depth)["attention_layers"]
    return {"attention_types": [[[layers[index]], 1] for index in kept]}


def nemotron_h_pattern(config: Config, depth: int, kept: Sequence[int]) -> dict[str, Any]:
    """The pattern of letters, which some configs hold instead of the list."""
    pattern = config.get("hybrid_override_pattern")
    return {"hybrid_override_pattern": "".join(pattern[i] for i in kept)} if isinstance(pattern, str) else {}


def kimi_linear_numbers(config: Config, depth: int, kept: Sequence[int]) -> dict[str, Any]:
    """The nested lists of block numbers, counted from 1."""
    nested = config.get("linear_attn_config")
    if not isinstance(nested, Mapping):
        return {}
    lists = {key: renumbered(nested[key], kept, 1) for key in ("full_attn_layers", "kda_layers") if key in nested}
    return {"linear_attn_config": {**nested, **lists}}


def minimax_m3_flags(config: Config, depth: int, kept: Sequence[int]) -> dict[str, Any]:
    """The nested per-block flags."""
    nested = config.get("sparse_attention_config")
    if not isinstance(nested, Mapping) or "sparse_attention_freq" not in nested:
        return {}
    flags = nested["sparse_attention_freq"]
    return {"sparse_attention_config": {**nested, "sparse_attention_freq": [flags[i] for i in kept]}}


def glm_dsa_pattern(config: Config, depth: int, kept: Sequence[int]) -> dict[str, Any]:
    """The pattern of letters, which the written list replaces."""
    pattern = config.get("index_topk_pattern")
    if pattern is None:
        return {}
    shorter = [pattern[index] for index in kept]
    return {"index_topk_pattern": "".join(shorter) if isinstance(pattern, str) else shorter}


def zamba2_numbers(config: Config, depth: int, kept: Sequence[int]) -> dict[str, Any]:
    """A stale list of hybrid blocks would win over the block types."""
    named = config.get("hybrid_layer_ids")
    return {} if named is None else {"hybrid_layer_ids": renumbered(named, kept)}
