"""The table of families: where blocks live, which config entries are per block, what cannot be shortened exactly.

The only place that knows model names. A family is a row; what no row can say is a small named function that the row
points at (in `families/`). All rules are pure functions of the raw
config, tested against transformers' AutoConfig.
"""

from __future__ import annotations

import dataclasses

from shortstack.checkpoint.anatomy import FULL, LINEAR, Config, Family, Widths
from shortstack.errors import ShortstackError
from shortstack.families import lists, refusals, rewrites, tensors
from shortstack.families.residual import RESIDUALS

# Where the language model of a composite has its weights; transformers takes them for some text models, too.
_OF_COMPOSITE = (("model.language_model.layers.", "model.language_model.embed_tokens.weight", "lm_head.weight"),)
_INSIDE_COMPOSITE = (
    ("language_model.model.layers.", "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
)
_GPT2 = Family("gpt2", prefix="transformer.h.", counts=("n_layer", "num_hidden_layers"), tied=True,
               embedding="transformer.wte.weight", buffers=("attn.bias", "attn.masked_bias"))  # fmt: skip
_MAMBA = Family("mamba", prefix="backbone.layers.", embedding="backbone.embeddings.weight", tied=True)
_DENSE_FIRST = {"first_k_dense_replace": 0}
_BERT = Family("bert", causal=False, tied=True)
_PASSED = "its blocks pass state to one another"
_SHAPED = "its hidden states have another shape than [windows, tokens, width]"
_TEXT_ARGUMENTS = "its blocks receive inputs that depend on the text, besides hidden states"

# Only the number of blocks changes, and names are the usual ones.
_PLAIN = (
    "apertus", "arcee", "bitnet", "doge", "flex_olmo", "glm", "glm4", "granite", "granitemoe", "granitemoeshared",
    "helium", "hunyuan_v1_dense", "hyperclovax", "jais2", "llama", "minimax_m2", "ministral3", "mistral", "mixtral",
    "nanochat", "nemotron", "olmo", "olmo2", "olmoe", "persimmon", "phi", "phi3", "phimoe", "seed_oss", "solar_open",
    "stablelm", "falcon_h1",
)  # fmt: skip
_PLAIN_TIED = ("cohere", "ernie4_5", "gemma", "jetmoe", "starcoder2")

_ROWS = [
    *(Family(name) for name in _PLAIN),
    *(Family(name, tied=True) for name in _PLAIN_TIED),
    # ---- other names
    dataclasses.replace(
        _GPT2, refusal=refusals.only_the_last_blocks(
            "scale_attn_by_inverse_layer_idx ties attention to the block's number",
            lambda config: bool(config.get("scale_attn_by_inverse_layer_idx")),
        ),
    ),
    dataclasses.replace(_GPT2, model_type="gpt_bigcode"),
    dataclasses.replace(_GPT2, model_type="gptj", tied=False),
    dataclasses.replace(_GPT2, model_type="codegen", tied=False),
    dataclasses.replace(_GPT2, model_type="ctrl", embedding="transformer.w.weight"),
    dataclasses.replace(_GPT2, model_type="openai-gpt", embedding="transformer.tokens_embed.weight"),
    dataclasses.replace(
        _GPT2, model_type="bloom",
        embedding="transformer.word_embeddings.weight",
    ),
    Family(
        "falcon", prefix="transformer.h.", counts=("num_hidden_layers", "n_layer"),
        embedding="transformer.word_embeddings.weight", tied=True,
    ),
    Family("mpt", prefix="transformer.blocks.", counts=("n_layers",), embedding="transformer.wte.weight", tied=True),
    Family("dbrx", prefix="transformer.blocks.", counts=("n_layers",), embedding="transformer.wte.weight"),
    Family(
        "gpt_neo", prefix="transformer.h.", counts=("num_layers",), lists=("attention_layers",), tied=True,
        implied=lists.gpt_neo_attention, rewrite=rewrites.gpt_neo_types, embedding="transformer.wte.weight",
        buffers=("attn.attention.bias", "attn.attention.masked_bias"),
    ),
    Family(
        "gpt_neox", prefix="gpt_neox.layers.", embedding="gpt_neox.embed_in.weight", head="embed_out.weight",
        buffers=("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
    ),
    Family(
        "gpt_neox_japanese", prefix="gpt_neox_japanese.layers.", embedding="gpt_neox_japanese.embed_in.weight",
        head="embed_out.weight", tied=True, tensors=tensors.last_block_has_dense_bias,
    ),
    Family("opt", prefix="model.decoder.layers.", embedding="model.decoder.embed_tokens.weight", tied=True),
    Family("xglm", counts=("num_layers",), tied=True),
    Family("biogpt", prefix="biogpt.layers.", embedding="biogpt.embed_tokens.weight", head="output_projection.weight",
           tied=True),
    Family(
        "cpmant", prefix="cpmant.encoder.layers.", embedding="cpmant.input_embedding.weight", tied=True, head="",
        embedding_rows=lambda config: config.get("prompt_types", 32) * config.get("prompt_length", 32),
        resident="its model puts its own prompt before the text",
    ),
    _MAMBA,
    dataclasses.replace(_MAMBA, model_type="falcon_mamba"),
    dataclasses.replace(_MAMBA, model_type="mamba2", tied=False),
    Family(
        "xlstm", prefix="backbone.blocks.", counts=("num_hidden_layers", "num_blocks"),
        embedding="backbone.embeddings.weight",
    ),
    Family(
        "rwkv", prefix="rwkv.blocks.", embedding="rwkv.embeddings.weight", head="head.weight",
        refusal=refusals.first_of(refusals.never_block_0("block 0 alone has the first norm"), refusals.rwkv_rescaling),
        resident=_PASSED, carried="state",
    ),
    Family("longcat_flash", counts=("num_layers",), rewrite=rewrites.longcat_caches),
    # ---- lists, written out where a config only holds the rule
    *(
        Family(name, implied=lists.sliding_from_max_window_layers()) for name in ("qwen2", "qwen3")
    ),
    *(Family(name, tied=True, implied=lists.periodic(2)) for name in ("gemma2", "vaultgemma")),
    Family("gpt_oss", implied=lists.periodic(2)),
    Family("gemma3_text", tied=True, implied=lists.periodic(6, key="sliding_window_pattern")),
    Family("cohere2", tied=True, implied=lists.periodic(4, key="sliding_window_pattern")),
    Family("cohere_compass_text", tied=True, implied=lists.uniform(FULL)),
    Family("cohere2_moe", tied=True, implied=lists.cohere2_moe_windows, leading=_DENSE_FIRST),
    Family("cwm", implied=lists.periodic(4, first=True)),
    Family("olmo3", implied=lists.periodic(4)),
    Family("exaone4", implied=lists.exaone_windows),
    Family(
        "exaone_moe", leading={"first_k_dense_replace": 1},
        implied=lists.both(lists.exaone_windows, lists.leading_dense(1, key="first_k_dense_replace")),
    ),
    Family("ministral", implied=lists.sliding_where_there_is_a_window),
    Family("mellum", implied=lists.both(lists.uniform(FULL), lists.uniform("sparse", "mlp_layer_types"))),
    Family("smollm3", tied=True, lists=("no_rope_layers",), implied=lists.smollm3_rope),
    *(
        Family(name, tied=tied, lists=("layer_rope_theta",), implied=lists.periodic(4, first=True))
        for name, tied in (("granite_swa", True), ("granitemoe_swa", False))
    ),
    Family(
        "granitemoehybrid", implied=lists.uniform(LINEAR), refusal=refusals.some_attention_stays(),
    ),
    Family("laguna", lists=("num_attention_heads_per_layer",), implied=lists.laguna_kinds),
    Family("hunyuan_v1_moe", lists=("moe_topk", "num_experts", "num_shared_expert", "moe_intermediate_size")),
    *(Family(name, implied=lists.leading_dense(1)) for name in ("glm4_moe_lite", "hy_v3")),
    Family("mimo_v2_flash", implied=lists.both(lists.first_and_every_sixth_full, lists.leading_dense(1))),
    Family(
        "deepseek_v32", leading={"first_k_dense_replace": 3},
        implied=lists.both(
            lists.uniform("deepseek_sparse_attention"), lists.leading_dense(3, key="first_k_dense_replace")
        ),
    ),
    Family("axk2", implied=lists.axk2_experts, leading=_DENSE_FIRST),
    Family(
        "glm_moe_dsa", lists=("indexer_types",), leading={"first_k_dense_replace": 3}, rewrite=rewrites.glm_dsa_pattern,
        implied=lists.both(
            lists.glm_dsa_indexers, lists.uniform("deepseek_sparse_attention"),
            lists.leading_dense(3, key="first_k_dense_replace"),
        ),
        refusal=refusals.indexers_keep_their_source, resident=_PASSED, carried="prev_topk_indices",
    ),
    Family(
        "hy_v4", lists=("indexer_types",),
        implied=lists.both(
            lists.hy_v4_indexers, lists.uniform("deepseek_sparse_attention"), lists.leading_dense(1)
        ),
        refusal=refusals.indexers_keep_their_source, resident=_PASSED, carried="prev_topk_indices",
    ),
    Family(
        "deepseek_v4", lists=("compress_ratios",), implied=lists.deepseek_v4_kinds, leading={"num_hash_layers": 3},
        head="head.weight", resident=_TEXT_ARGUMENTS,
    ),
    Family(
        "minimax_m3_vl_text", implied=lists.minimax_m3_kinds, lists=("moe_layer_freq",),
        rewrite=rewrites.minimax_m3_flags,
    ),
    Family(
        "minimax", implied=lists.periodic(2, first=True, miss=LINEAR), refusal=refusals.minimax_decays,
    ),
    Family(
        "kimi_linear", implied=lists.kimi_linear_kinds, leading={"first_k_dense_replace": 1},
        rewrite=rewrites.kimi_linear_numbers, refusal=refusals.some_attention_stays(),
    ),
    Family("inkling_text", implied=lists.inkling_kinds, leading={"dense_mlp_idx": 0}, numbers=("local_layer_ids",)),
    Family(
        "lfm2", tied=True, implied=lists.lfm2_attention, numbers=("full_attn_idxs",), refusal=refusals.some_attention_stays(),
    ),
    Family(
        "lfm2_moe", tied=True, leading={"num_dense_layers": 2}, refusal=refusals.some_attention_stays(),
    ),
    Family(
        "nemotron_h", prefix="backbone.layers.", embedding="backbone.embeddings.weight", depth=lists.nemotron_h_depth,
        lists=("layers_block_type",), implied=lists.nemotron_h_kinds, rewrite=rewrites.nemotron_h_pattern,
        refusal=refusals.some_attention_stays("layers_block_type"),
    ),
    Family(
        "olmo_hybrid", implied=lists.olmo_hybrid_kinds, refusal=refusals.each_type_stays("layer_types"),
    ),
    Family(
        "modernbert-decoder", tied=True, embedding="model.embeddings.tok_embeddings.weight", head="decoder.weight",
        implied=lists.periodic(3, key="global_attn_every_n_layers", first=True),
        refusal=refusals.never_block_0("block 0 alone has no norm before attention"),
    ),
    Family("youtu", tied=True, resident="transformers clears its padding token's embedding when it loads it"),
    Family(
        "zaya", tied=True, implied=lists.uniform("hybrid"), tensors=tensors.zaya_first_router,
        resident=_PASSED, carried="prev_router_hidden_states",
    ),
    *(
        Family(
            name, refusal=refusals.some_attention_stays(),
            implied=lists.periodic(4, key="full_attention_interval", miss=LINEAR), other_names=_OF_COMPOSITE,
        )
        for name in ("qwen3_5_text", "qwen3_5_moe_text")
    ),
    # ---- block numbers, counts and rules to re-derive
    *(
        Family(name, leading={"first_k_dense_replace": default})
        for name, default in (("deepseek_v2", 0), ("deepseek_v3", 3), ("glm4_moe", 1), ("axk1", 1))
    ),
    Family(
        "dots1", leading=_DENSE_FIRST, implied=lists.sliding_from_max_window_layers(4096, 62, switch=False),
    ),
    Family(
        "afmoe", leading={"num_dense_layers": 1}, implied=lists.periodic(4, key="global_attn_every_n_layers"),
    ),
    Family("qwen2_moe", implied=lists.qwen2_moe_windows, rewrite=rewrites.qwen_moe_experts()),
    Family("qwen3_moe", rewrite=rewrites.qwen_moe_experts()),
    Family(
        "qwen3_next", implied=lists.periodic(4, key="full_attention_interval", miss=LINEAR),
        rewrite=rewrites.qwen_moe_experts(), refusal=refusals.some_attention_stays(),
    ),
    Family("llama4_text", lists=("no_rope_layers",), implied=lists.llama4_rope, rewrite=rewrites.llama4_experts,
           other_names=_INSIDE_COMPOSITE),
    Family(
        "bamba", numbers=("attn_layer_indices",),
        refusal=refusals.some_attention_stays("layers_block_type", lists.bamba_kinds),
    ),
    Family(
        "recurrent_gemma", tied=True, rewrite=rewrites.recurrent_gemma_kinds,
        refusal=refusals.some_attention_stays("layers_block_type", lists.recurrent_gemma_cycle),
    ),
    Family("minicpm3", tied=True, rewrite=rewrites.minicpm3_residual_scale),
    Family("ernie4_5_moe", tied=True, rewrite=rewrites.ernie_experts, refusal=refusals.ernie_irregular),
    Family("jamba", rewrite=rewrites.jamba_kinds, refusal=refusals.jamba_irregular),
    Family(
        "zamba", tied=True, lists=("layers_block_type",), implied=lists.zamba_kinds,
        tensors=tensors.zamba_shared_block, refusal=refusals.two_hybrid_blocks_stay,
        resident=_TEXT_ARGUMENTS,
    ),
    Family(
        "zamba2", tied=True, lists=("layers_block_type",), rewrite=rewrites.zamba2_numbers,
        tensors=tensors.zamba2_shared_blocks, refusal=refusals.zamba2_ordinals, resident=_TEXT_ARGUMENTS,
    ),
    Family(
        "gemma3n_text", tied=True, other_names=_OF_COMPOSITE, lists=("intermediate_size", "activation_sparsity_pattern"),
        implied=lists.gemma3n_kinds, trailing={"num_kv_shared_layers": 15},
        refusal=refusals.shared_keys_keep_their_source(15), tensors=tensors.per_layer_embeddings, resident=_SHAPED,
    ),
    *(
        Family(
            name, tied=True, implied=lists.gemma4_kinds, trailing={"num_kv_shared_layers": 0},
            refusal=refusals.gemma4_last_and_shared, tensors=tensors.per_layer_embeddings, resident=_PASSED,
        )
        for name in ("gemma4_text", "gemma4_unified_text")
    ),
    Family(
        "qwen4_exp_text", other_names=_OF_COMPOSITE, numbers_from_1=("ple_layer_ids",),
        refusal=refusals.first_of(refusals.qwen4_ngrams, refusals.some_attention_stays()),
        implied=lists.periodic(4, key="full_attention_interval", hit="qwen_sparse_attention", miss=LINEAR),
        resident=_SHAPED,
    ),
    # ---- encoders and decoders of other models, run as causal language models
    *(
        dataclasses.replace(
            _BERT, model_type=name, prefix=f"{base}.encoder.layer.",
            embedding=f"{base}.embeddings.word_embeddings.weight", head=head,
        )
        for name, base, head in (
            ("bert", "bert", "cls.predictions.decoder.weight"),
            ("bert-generation", "bert", "lm_head.decoder.weight"),
            ("camembert", "roberta", "lm_head.decoder.weight"),
            ("roberta", "roberta", "lm_head.decoder.weight"),
            ("electra", "electra", "generator_lm_head.weight"),
            ("roformer", "roformer", "cls.predictions.decoder.weight"),
        )
    ),
    Family(
        "rembert", prefix="rembert.encoder.layer.", embedding="rembert.embeddings.word_embeddings.weight",
        head="cls.predictions.decoder.weight", causal=False,
    ),
    *(
        dataclasses.replace(
            _BERT, model_type=name, prefix="model.decoder.layers.", counts=("decoder_layers",),
            embedding="model.decoder.embed_tokens.weight", refusal=refusals.decoder_alone,
        )
        for name in ("bart", "mbart", "pegasus")
    ),
    Family(
        "xlnet", prefix="transformer.layer.", counts=("n_layer",), embedding="transformer.word_embedding.weight",
        head="lm_loss.weight", tied=True, causal=False, resident=_SHAPED,
    ),
    # ---- refused whole
    Family(
        "diffllama",
        refusal=refusals.only_the_last_blocks("the weight of its second attention is a formula of the block's number"),
    ),
    Family("hrm_text", prefix="model.H_module.layers.", refused="two stacks of blocks are run in cycles"),
    Family(
        "reformer", prefix="reformer.encoder.layers.", embedding="reformer.embeddings.word_embeddings.weight",
        head="lm_head.decoder.weight", refused="its blocks are reversible pairs, which cannot be bypassed",
        causal=False,
    ),
    Family(
        "xlm", prefix="transformer.ffns.", counts=("n_layers",), embedding="transformer.embeddings.weight",
        head="pred_layer.proj.weight", tied=True, causal=False,
        refused="the parts of a block are in four lists, and no module is one block",
    ),
]  # fmt: skip

# Families whose blocks can be made narrower: q_proj, k_proj, v_proj and o_proj by heads, the MLP's projections by channels,
# and no norm over all heads together. A test builds each of them narrower and sets it beside the dense model with masks.
_WIDTHS = {
    **dict.fromkeys(
        ("exaone4", "gemma", "granite", "hunyuan_v1_dense", "ministral", "ministral3", "mistral", "qwen2", "qwen3",
         "seed_oss", "smollm3"),
        Widths(),
    ),
    **dict.fromkeys(("cwm", "gemma2", "gemma3_text", "llama"), Widths(heads_divide_hidden=True)),
    "arcee": Widths(inner=("mlp.up_proj",), heads_divide_hidden=True),
}  # fmt: skip
_ROWS = [
    dataclasses.replace(row, widths=_WIDTHS.get(row.model_type), residual=RESIDUALS.get(row.model_type))
    for row in _ROWS
]


def _composite(
    text: str, model_type: str, prefix: str, head: str = "", others: tuple[tuple[str, str, str], ...] = ()
) -> Family:
    """The row of a model with a language model inside: that family's rules, at other names."""
    row = next(row for row in _ROWS if row.model_type == text)
    base = prefix.removesuffix("layers.")
    return dataclasses.replace(
        row, model_type=model_type, nested="text_config", prefix=prefix, embedding=f"{base}embed_tokens.weight",
        head=head or "lm_head.weight", other_names=others,
    )  # fmt: skip


_COMPOSITES = [
    _composite("gemma3_text", "gemma3", "language_model.model.layers.", "language_model.lm_head.weight", _OF_COMPOSITE),
    _composite("llama4_text", "llama4", "language_model.model.layers.", "language_model.lm_head.weight"),
    _composite("qwen3_5_text", "qwen3_5", "model.language_model.layers."),
    _composite("qwen3_5_moe_text", "qwen3_5_moe", "model.language_model.layers."),
]
FAMILIES: dict[str, Family] = {family.model_type: family for family in [*_ROWS, *_COMPOSITES]}


def family_of(config: Config, place: str) -> Family:
    """The row of a config's `model_type`.

    Raises:
        UnknownFamilyError: the table has no row for it.
        ShortstackError: the config names none, or this is not a causal language model.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ShortstackError(
            f"{place}: config.json has no model_type", hint="check that this is a Hugging Face language model"
        )
    if model_type not in FAMILIES:
        raise UnknownFamilyError(place, model_type, config)
    family = FAMILIES[model_type]
    if family.refused:
        raise ShortstackError(
            f"{place}: {model_type} models cannot be shortened: {family.refused}",
            hint="`shortstack families` lists those that can",
        )
    return family


class UnknownFamilyError(ShortstackError):
    """A `model_type` that the table has no row for; it can be probed by its config, or is refused."""

    def __init__(self, place: str, model_type: str, config: Config) -> None:
        super().__init__(
            f"{place}: the family {model_type!r} is not in shortstack's table, so it may not shorten exactly",
            hint="`shortstack families` lists those that are known; docs/adding-a-family.md shows how to add one",
        )
        self.model_type = model_type
        self.config = config
