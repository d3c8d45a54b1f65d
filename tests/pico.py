"""Pico models, built on the spot: real checkpoints of real families, a few blocks of hidden size 32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 260
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 6,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
# family -> what its tiny config needs beyond COMMON
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "qwen2": SLIDING,
    "qwen3": SLIDING,
    "gemma": {},
    "gemma2": {"sliding_window": 4, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 4, "query_pre_attn_scalar": 8, "sliding_window_pattern": 3},
    "gpt2": GPT2,
    "gpt_neox": {},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
}

_DERIVED_HEAD_DIM = {"falcon"}  # their configs refuse the entry


def tokenizer(*, ending: bool = False, backwards: bool = False) -> PreTrainedTokenizerFast:
    """Bytes as tokens: 3 special ones, then 256. `ending` puts the end of text behind every text; `backwards` is another one,
    which numbers the bytes from the last to the first.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=backwards)
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if ending else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def build(
    directory: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int | None = None,
    with_tokenizer: bool = True,
    **overrides: Any,
) -> Path:
    """Write a checkpoint with every parameter random (norms and biases too, so that nothing is neutral)."""
    needs = FAMILIES.get(family, {})
    base = needs if family == "gpt2" else {**COMMON, **needs}
    if family in _DERIVED_HEAD_DIM:
        base = {key: value for key, value in base.items() if key != "head_dim"}
    config = AutoConfig.for_model(family, **{**base, **overrides})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for index, (name, parameter) in enumerate(sorted(model.named_parameters())):
            # Scales differ between tensors, so that blocks come to matter differently.
            scale = 0.15 + 0.1 * (index % 4)
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator) * scale + (1.0 if "norm" in name else 0.0)
            )
    model = model.to(dtype)
    kwargs = {"max_shard_size": shard_bytes} if shard_bytes else {}
    model.save_pretrained(directory, **kwargs)
    if with_tokenizer:
        tokenizer().save_pretrained(directory)
    return directory


def without_lists(directory: Path) -> Path:
    """Make a config hold only the rule, as many published ones do."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config.pop("layer_types", None)
    path.write_text(json.dumps(config))
    return directory


def end_header_at_an_odd_byte(path: Path) -> None:
    """As the format allows; numbers then begin where they cannot be used as they lie."""
    raw = path.read_bytes()
    header = int.from_bytes(raw[:8], "little")
    odd = 1 - header % 2
    path.write_bytes((header + odd).to_bytes(8, "little") + raw[8 : 8 + header] + b" " * odd + raw[8 + header :])


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa").eval()


def windows(count: int = 4, length: int = 16, seed: int = 7, vocabulary: int = VOCABULARY) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (count, length), generator=generator).tolist()
