"""A file that is not the checkpoint it was made of is found out, whatever is wrong with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shortstack.errors import ShortstackError
from shortstack.families.open_model import open_checkpoint
from shortstack.pruning.prune import prune
from shortstack.publishing.export.gguf_check import check_gguf
from tests import gguf, pico
from tests.publishing.export import fake

Built = Callable[..., Path]
Metadata = dict[str, Any]
Tensors = dict[str, tuple[str, np.ndarray]]


def checked(model: Path, metadata: Metadata, tensors: Tensors, folder: Path) -> list[str]:
    return check_gguf(gguf.write(folder / "m.gguf", metadata, tensors), open_checkpoint(model))


def blocks_swapped(metadata: Metadata, tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith("blk.1.")]:
        other = name.replace("blk.1.", "blk.2.")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def a_block_less(metadata: Metadata, tensors: Tensors) -> None:
    metadata["llama.block_count"] -= 1
    for name in [name for name in tensors if name.startswith("blk.5.")]:
        del tensors[name]


def another_number(metadata: Metadata, tensors: Tensors) -> None:
    metadata["llama.block_count"] = 5


def a_gap(metadata: Metadata, tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith("blk.5.")]:
        tensors[name.replace("blk.5.", "blk.6.")] = tensors.pop(name)


def a_tensor_less(metadata: Metadata, tensors: Tensors) -> None:
    del tensors["blk.3.ffn_down.weight"]


def turned(metadata: Metadata, tensors: Tensors) -> None:
    kind, values = tensors["blk.3.ffn_down.weight"]
    tensors["blk.3.ffn_down.weight"] = kind, np.ascontiguousarray(values.T)


def rows_less(metadata: Metadata, tensors: Tensors) -> None:
    kind, values = tensors["token_embd.weight"]
    tensors["token_embd.weight"] = kind, values[:-1]


def no_head(metadata: Metadata, tensors: Tensors) -> None:
    del tensors["output.weight"]


def no_tokenizer(metadata: Metadata, tensors: Tensors) -> None:
    metadata["tokenizer.ggml.model"] = "none"


def a_token_less(metadata: Metadata, tensors: Tensors) -> None:
    metadata["tokenizer.ggml.tokens"].pop()


def tokens_moved(metadata: Metadata, tensors: Tensors) -> None:
    tokens = metadata["tokenizer.ggml.tokens"]
    tokens[10], tokens[11] = tokens[11], tokens[10]


def not_a_number(metadata: Metadata, tensors: Tensors) -> None:
    tensors["output_norm.weight"][1][0] = np.nan


@pytest.mark.fault(120)
@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (blocks_swapped, "block 1 holds the weights of another block"),
        (a_block_less, "states 5 blocks, 6 were expected"),
        (another_number, "states 5 blocks"),
        (a_gap, "holds block 0-4, 6, 0-5 were expected"),
        (a_tensor_less, "block 3 has .* weights"),
        (turned, r"blk.3.ffn_down.weight has shape \[48, 32\], \[32, 48\] was expected"),
        (rows_less, "token_embd.weight has shape"),
        (no_head, "output.weight is missing"),
        (no_tokenizer, "no tokenizer"),
        (a_token_less, "259 tokens, the embedding has 260 rows"),
        (tokens_moved, "token 10 is"),
        (not_a_number, "output_norm.weight holds numbers that are not finite"),
    ],
)
def test_files_of_something_else(
    wrong: Callable[[Metadata, Tensors], None], says: str, built: Built, tmp_path: Path
) -> None:
    metadata, tensors = fake.parts(built())
    assert checked(built(), metadata, tensors, tmp_path) == []
    wrong(metadata, tensors)
    with pytest.raises(ShortstackError, match=says):
        checked(built(), metadata, tensors, tmp_path)


def test_norms_plus_one(built: Built, tmp_path: Path) -> None:
    """As the files of Gemma hold them."""
    metadata, tensors = fake.parts(built())
    for name in [name for name in tensors if name.endswith("attn_norm.weight")]:
        tensors[name] = "F32", tensors[name][1] + 1
    assert checked(built(), metadata, tensors, tmp_path) == []


def test_more_weights_than_there_were_are_reported(built: Built, tmp_path: Path) -> None:
    metadata, tensors = fake.parts(built())
    tensors["blk.2.attn_rot_embd.weight"] = "F32", np.ones(4, dtype=np.float32)
    assert checked(built(), metadata, tensors, tmp_path) == ["block 2 holds 4 more weights than in the checkpoint"]


def test_without_tokenizer_json_tokens_are_counted(built: Built, tmp_path: Path) -> None:
    metadata, tensors = fake.parts(built())
    model = Path(shutil.copytree(built(), tmp_path / "m"))
    (model / "tokenizer.json").unlink()
    [note] = checked(model, metadata, tensors, tmp_path)
    assert "counted, not compared" in note


def test_types_that_are_not_read_are_reported(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata, tensors = fake.parts(built())
    tensors["blk.2.odd.weight"] = "F32", np.zeros(8, dtype=np.float32)
    path = gguf.write(tmp_path / "m.gguf", metadata, tensors)
    raw = path.read_bytes()
    at = raw.index(b"blk.2.odd.weight") + len("blk.2.odd.weight") + 4 + 8
    path.write_bytes(raw[:at] + (39).to_bytes(4, "little") + raw[at + 4 :])
    notes = check_gguf(path, open_checkpoint(built()))
    assert notes[-1] == "1 tensors are of types that are not read here"


@pytest.mark.fault(122)
@pytest.mark.parametrize(
    ("removed", "stated", "fits"),
    [
        ("0-2", None, True),  # a whole period: the rule still holds
        ("1", None, False),
        ("1", [1, 0, 1, 1, 0], True),  # the file says which is which
        ("1", [0, 1, 0, 0, 1], True),  # in whatever terms
        ("1", [1, 1, 0, 1, 1], False),
    ],
)
def test_blocks_of_several_kinds(
    removed: str, stated: list[int] | None, fits: bool, built: Built, tmp_path: Path
) -> None:
    """llama.cpp has a fixed pattern for gemma3, and would give blocks another window than they had."""
    out = tmp_path / "p"
    prune(str(built("gemma3_text")), out=out, blocks=removed, quiet=True)
    metadata, tensors = of_gemma(out)
    if stated is not None:
        metadata["gemma3.attention.sliding_window_pattern"] = stated
    if fits:
        assert checked(out, metadata, tensors, tmp_path) == []
        return
    with pytest.raises(ShortstackError, match=r"not all alike \(layer_types\)"):
        checked(out, metadata, tensors, tmp_path)


def of_gemma(model: Path) -> tuple[Metadata, Tensors]:
    """What a file of it would hold, as far as that is compared."""
    checkpoint = open_checkpoint(model)
    tokens = {
        index: token for token, index in json.loads((model / "tokenizer.json").read_text())["model"]["vocab"].items()
    }
    metadata = {
        "general.architecture": "gemma3", "gemma3.block_count": checkpoint.depth, "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [tokens.get(index, "[PAD]") for index in range(pico.VOCABULARY)],
    }  # fmt: skip
    values = {name: tensor.float().numpy() for name, tensor in pico.load(model).state_dict().items()}
    tensors = {"token_embd.weight": ("F32", values[checkpoint.anatomy.embedding])}
    for number, block in enumerate(checkpoint.blocks):
        for tensor in block:
            inner = checkpoint.anatomy.within_block(tensor.name).removesuffix(".weight")
            plus = 1 if tensor.name.endswith("norm.weight") else 0
            tensors[f"blk.{number}.{fake.NAMES.get(inner, inner)}.weight"] = ("F32", values[tensor.name] + plus)
    return metadata, tensors
