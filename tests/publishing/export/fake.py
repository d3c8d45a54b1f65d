"""A small program that speaks the protocol of llama.cpp's converter, and misbehaves on demand."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from tests import gguf

ROOT = Path(__file__).resolve().parents[3]
# Names within a block: in a checkpoint of the llama family -> in the file.
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}  # fmt: skip
_ERRORS = {
    "full": "OSError: [Errno 28] No space left on device",
    "tokenizer": "NotImplementedError: BPE pre-tokenizer was not recognized - update get_vocab_base_pre()",
    "quantized": "NotImplementedError: Quant method is not yet supported: 'awq'",
    "architecture": "ERROR:hf-to-gguf:Model PicoForCausalLM is not supported",
    "tensor": "ValueError: Can not map tensor 'model.layers.0.extra.weight'",
    "package": "ModuleNotFoundError: No module named 'sentencepiece'",
    "old": "convert_hf_to_gguf.py: error: argument --outtype: invalid choice: 'bf16'",
    "odd": "KeyError: 'rope_theta'",
}
_PROGRAM = """
import sys
sys.path.insert(0, {root!r})
from tests.publishing.export.fake import main
main({behaviour!r})
"""


def converter(folder: Path, behaviour: str = "", name: str = "convert_hf_to_gguf.py") -> Path:
    """A converter that behaves so; executable, as in a checkout of llama.cpp."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!{sys.executable}\n" + _PROGRAM.format(root=str(ROOT), behaviour=behaviour))
    path.chmod(0o755)
    return path


def main(behaviour: str) -> None:
    """The program."""
    source, out = Path(sys.argv[1]), Path(sys.argv[sys.argv.index("--outfile") + 1])
    kind = sys.argv[sys.argv.index("--outtype") + 1]
    call = {"arguments": sys.argv[1:], "environment": dict(os.environ)}
    Path(sys.argv[0]).with_name("call.json").write_text(json.dumps(call))
    print("INFO:hf-to-gguf:Loading model", file=sys.stderr)
    if behaviour == "hang":
        signal.pause()
    if behaviour == "nothing":
        return
    write(source, out, "f16" if kind == "auto" else kind)
    if behaviour == "half":
        os.truncate(out, out.stat().st_size // 2)
    if behaviour == "rubbish":
        out.write_bytes(b"<!DOCTYPE html>")
    if behaviour == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour in _ERRORS:
        os.truncate(out, out.stat().st_size // 2)
        print(f"Traceback (most recent call last):\n  File x\n{_ERRORS[behaviour]}", file=sys.stderr)
        sys.exit(1)


def parts(source: Path, kind: str = "f32") -> tuple[dict[str, Any], dict[str, tuple[str, np.ndarray]]]:
    """Metadata and tensors of a checkpoint of the llama family, as the converter would write them."""
    config = json.loads((source / "config.json").read_text())
    vocabulary = json.loads((source / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = [f"[PAD{index}]" for index in range(config["vocab_size"])]
    for token, index in vocabulary.items():
        tokens[index] = token
    metadata = {
        "general.architecture": "llama", "llama.block_count": config["num_hidden_layers"],
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens,
    }  # fmt: skip
    tensors: dict[str, tuple[str, np.ndarray]] = {}
    for file in sorted(source.glob("*.safetensors")):
        for name, values in load_file(file).items():
            stored = kind.upper() if values.ndim > 1 else "F32"
            stored = "F16" if stored == "Q8_0" and values.shape[-1] % 32 else stored
            tensors[renamed(name)] = (stored, values.astype(np.float32))
    return metadata, tensors


def renamed(name: str) -> str:
    """What a tensor of a checkpoint is called in the file."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    number, _, inner = name.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{NAMES[inner.removesuffix('.weight')]}.weight"


def write(source: Path, out: Path, kind: str = "f32") -> Path:
    """Convert a checkpoint of the llama family."""
    return gguf.write(out, *parts(source, kind))
