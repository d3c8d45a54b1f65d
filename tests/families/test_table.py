"""The rules of the table against transformers' own configs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING, AutoConfig

from shortstack.checkpoint.anatomy import depth_of, is_tied, per_block_lists
from shortstack.common.formatting import ranges
from shortstack.errors import ShortstackError
from shortstack.families.open_model import open_checkpoint
from shortstack.families.table import FAMILIES
from tests import pico

# family -> settings that its rule reads, beside none at all
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "qwen2": [
        {"use_sliding_window": True, "max_window_layers": 3},
        {"use_sliding_window": True, "sliding_window": None},
    ],
    "qwen3": [{"use_sliding_window": True, "max_window_layers": 3}],
    "qwen2_moe": [{"use_sliding_window": True, "max_window_layers": 4}],
    "gemma3_text": [{"sliding_window_pattern": 4}],
    "cohere2": [{"sliding_window_pattern": 3}],
    "cohere2_moe": [
        {"first_k_dense_replace": 2, "sliding_window_pattern": 3, "prefix_dense_sliding_window_pattern": 2}
    ],
    "exaone4": [{"sliding_window_pattern": 3}],
    "exaone_moe": [{"sliding_window_pattern": 3, "first_k_dense_replace": 2}],
    "ministral": [{"sliding_window": None}],
    "smollm3": [{"no_rope_layer_interval": 3, "use_sliding_window": True, "sliding_window": 8}],
    "llama4_text": [{"no_rope_layer_interval": 3}, {"interleave_moe_layer_step": 2}],
    "lfm2": [{"full_attn_idxs": [0]}],
    "dots1": [{"max_window_layers": 2}, {"sliding_window": None}],
    "afmoe": [{"global_attn_every_n_layers": 3}],
    "modernbert-decoder": [{"global_attn_every_n_layers": 2}],
    "deepseek_v32": [{"first_k_dense_replace": 1}],
    "axk2": [{"first_k_dense_replace": 2, "moe_layer_freq": 2}],
    "glm_moe_dsa": [{"index_topk_freq": 3, "index_skip_topk_offset": 1}, {"first_k_dense_replace": 1}],
    "deepseek_v4": [{"num_hash_layers": 1}],
    "kimi_linear": [{"first_k_dense_replace": 2}],
    "inkling_text": [{"local_layer_ids": [0, 2]}, {"dense_mlp_idx": 1}],
    "qwen3_next": [{"full_attention_interval": 3}],
    "qwen3_5_text": [{"full_attention_interval": 3}],
    "qwen3_5_moe_text": [{"full_attention_interval": 3}],
    "qwen4_exp_text": [{"full_attention_interval": 2}],
    "zamba": [{"attn_layer_period": 3, "attn_layer_offset": 1}],
    "laguna": [{"num_attention_heads": 8}],
    "gemma3n_text": [{"intermediate_size": 64}],
}
# A list of one depth: the rule is a list itself. And depths that a config class does not take.
FIXED: dict[str, tuple[int, dict[str, Any]]] = {
    "gpt_neo": (4, {"attention_types": [[["global", "local"], 1], [["local"], 2]], "num_layers": 4}),
    "nemotron_h": (5, {"hybrid_override_pattern": "ME*-M"}),
    "kimi_linear": (4, {"linear_attn_config": {"full_attn_layers": [1, 4], "kda_layers": [2, 3]}}),
    "minimax_m3_vl_text": (
        3, {"sparse_attention_config": {"sparse_attention_freq": [0, 1, 1]}, "moe_layer_freq": [0, 0, 1]},
    ),
    "deepseek_v4": (3, {"compress_ratios": [0, 4, 128]}),
    "glm_moe_dsa": (4, {"index_topk_pattern": "FSFS"}),
}  # fmt: skip
# transformers' own config refuses fewer blocks.
LEAST_DEPTH = {"zamba": 3, "olmo_hybrid": 2, "inkling_text": 3, "lfm2": 1, "cohere2_moe": 2}
RULES = sorted(name for name, row in FAMILIES.items() if row.implied is not None and not row.nested)


def lists_of(family: str, depth: int, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what our rule implies of this config, what AutoConfig expands), by the lists' names."""
    count = FAMILIES[family].counts[0]
    given = dict(settings) if family == "nemotron_h" else {count: depth, **settings}
    expected = AutoConfig.for_model(family, **given)
    row = FAMILIES[family]
    assert row.implied is not None
    found = per_block_lists(given, row, depth, "here")
    names = row.implied(given, depth)
    return {key: found[key] for key in names}, {key: list(getattr(expected, key)) for key in names}


@pytest.mark.parametrize(
    ("family", "depth"),
    [
        (name, depth)
        for name in RULES
        for depth in (1, 2, 3, 5, 6, 13, 30)
        if name not in ("gpt_neo", "nemotron_h") and depth >= LEAST_DEPTH.get(name, 1)
    ],
)
def test_implied_lists_are_what_autoconfig_expands(family: str, depth: int) -> None:
    for settings in [{}, *SETTINGS.get(family, [])]:
        ours, theirs = lists_of(family, depth, settings)
        assert ours == theirs, settings


@pytest.mark.parametrize("family", sorted(FIXED))
def test_lists_that_the_config_spells_otherwise(family: str) -> None:
    depth, settings = FIXED[family]
    count = FAMILIES[family].counts[0]
    ours, theirs = lists_of(family, depth, settings if family == "nemotron_h" else {**settings, count: depth})
    assert ours
    assert ours == theirs


@pytest.mark.parametrize("family", sorted(name for name, row in FAMILIES.items() if row.causal and not row.refused))
def test_tied_by_default_is_what_the_config_class_says(family: str) -> None:
    expected = getattr(AutoConfig.for_model(family).get_text_config(), "tie_word_embeddings", False)
    assert is_tied({}, FAMILIES[family]) == bool(expected)


@pytest.mark.parametrize("family", sorted(name for name, row in FAMILIES.items() if row.leading or row.trailing))
def test_defaults_of_counts_are_those_of_the_config_class(family: str) -> None:
    row = FAMILIES[family]
    plain = CONFIG_MAPPING[family]()
    for key, default in {**row.leading, **row.trailing}.items():
        if hasattr(plain, key):
            assert getattr(plain, key) == default, key


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "mixtral"])
def test_rows_fit_the_models(built: Callable[..., Path], family: str) -> None:
    """Count entry, prefix, embedding and head of the row are those of a checkpoint that is saved."""
    checkpoint = open_checkpoint(built(family))
    assert checkpoint.depth == 6
    assert checkpoint.parameters() == sum(p.numel() for p in pico.load(checkpoint.directory).parameters())


@pytest.mark.parametrize("value", [-1, 0, "6", 6.0, True, None])
def test_a_number_of_blocks_that_is_none(value: object) -> None:
    with pytest.raises(ShortstackError, match="expected a whole number >= 1"):
        depth_of({"model_type": "llama", "num_hidden_layers": value}, FAMILIES["llama"], "here")


def test_no_model_name_anywhere_else() -> None:
    """One place knows families: no name of one stands in a string elsewhere in the package."""
    import ast

    import shortstack

    root = Path(shortstack.__file__).parent
    named = []
    for path in root.rglob("*.py"):
        # The table lies in two files; bitnet names a quantization method, too.
        if path.name in ("table.py", "residual.py", "renumber_names.py"):
            continue
        if path.name == "llama_cpp.py":  # an engine's environment is called llama
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in FAMILIES:
                named.append(f"{path}:{node.lineno} names the family {node.value!r}")
    assert named == []


def test_ranges() -> None:
    assert ranges([9, 0, 1, 2, 3, 7, 10]) == "0-3, 7, 9-10"
    assert ranges([]) == ""
