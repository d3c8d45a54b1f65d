"""Where repairs are folded: what writes into the hidden states of each family's blocks. A test tries every row."""

from __future__ import annotations

import dataclasses

from shortstack.checkpoint.anatomy import Config, Residual


def _opt_norms_behind(config: Config) -> str | None:
    if config.get("do_layer_norm_before", True) is False:
        return "its norms follow the sums, and undo a factor"
    return "it has no final norm" if config.get("_remove_final_layer_norm") else None


def _norms_behind_residual(config: Config) -> str | None:
    if config.get("apply_residual_connection_post_layernorm"):
        return "what is added to is the output of a norm, and not the block's input"
    return None


_USUAL = Residual()
_EXPERTS = ("mlp.experts.*.down_proj", "mlp.down_proj")
_SHARED = (*_EXPERTS, "mlp.shared_expert.down_proj", "mlp.shared_experts.down_proj")
_DENSE = Residual(("self_attention.dense",), ("mlp.dense_4h_to_h",), refusal=_norms_behind_residual)
_POST = ("post_attention_layernorm", "post_feedforward_layernorm")
_READERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
_GEMMA = Residual(norms=_POST, one_plus=True)
_NO_INPUT_NORMS = Residual(norms=_POST, readers=_READERS)

RESIDUALS: dict[str, Residual] = {
    **dict.fromkeys(
        ("apertus", "arcee", "cohere", "cohere2", "cwm", "ernie4_5", "gemma", "glm", "granite", "helium",
         "hunyuan_v1_dense", "llama", "ministral", "ministral3", "mistral", "nemotron", "olmo", "phi3",
         "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm"),
        _USUAL,
    ),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA),
    "glm4": Residual(norms=("post_self_attn_layernorm", "post_mlp_layernorm")),
    **dict.fromkeys(("olmo2", "olmo3", "exaone4"), _NO_INPUT_NORMS),
    # ---- mixtures of experts
    "mixtral": Residual(mlp=("block_sparse_moe.experts.*.w2",)),
    **dict.fromkeys(("olmoe", "qwen3_moe"), Residual(mlp=_EXPERTS)),
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "dots1", "glm4_moe", "qwen2_moe"), Residual(mlp=_SHARED)
    ),
    # ---- other names
    "gpt2": Residual(("attn.c_proj",), ("mlp.c_proj",), transposed=True),
    "gptj": Residual(("attn.out_proj",), ("mlp.fc_out",)),
    "codegen": Residual(("attn.out_proj",), ("mlp.fc_out",)),
    "gpt_neo": Residual(("attn.attention.out_proj",), ("mlp.c_proj",)),
    "gpt_neox": Residual(("attention.dense",), ("mlp.dense_4h_to_h",)),
    "bloom": _DENSE,
    "falcon": _DENSE,
    "mpt": Residual(("attn.out_proj",), ("ffn.down_proj",)),
    "opt": Residual(("self_attn.out_proj",), ("fc2",), refusal=_opt_norms_behind),
    "phi": Residual(("self_attn.dense",), ("mlp.fc2",)),
    "persimmon": Residual(("self_attn.dense",), ("mlp.dense_4h_to_h",)),
    "starcoder2": dataclasses.replace(_USUAL, mlp=("mlp.c_proj",)),
}  # fmt: skip
