"""Tensor names with something in front: accepted where transformers loads them cleanly, else refused with the prefix."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shortstack.checkpoint.drop_blocks import reason_against
from shortstack.errors import ShortstackError
from shortstack.families.open_model import open_checkpoint
from shortstack.inspection.info import info
from shortstack.pruning.prune import prune
from tests import pico
from tests.families import tiny

Tiny = Callable[[str], Path]
Rename = Callable[[str], str]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def renamed(model: Path, folder: Path, rename: Rename) -> Path:
    copy = folder / "renamed"
    shutil.copytree(model, copy)
    file = copy / "model.safetensors"
    save_file({rename(name): value for name, value in load_file(file).items()}, file, {"format": "pt"})
    return copy


def _of_composite(name: str) -> str:
    if name.startswith("language_model."):
        return name.removeprefix("language_model.").replace("model.", "model.language_model.", 1)
    return name.replace("model.", "model.language_model.", 1)


LOADED: list[tuple[str, Rename]] = [
    ("qwen3_5_text", _of_composite),
    ("qwen3_5_moe_text", _of_composite),
    ("gemma3n_text", _of_composite),
    ("qwen4_exp_text", _of_composite),
    ("gemma3", _of_composite),
    ("llama4_text", lambda name: f"language_model.{name}"),
]


@pytest.mark.fault(112)
@pytest.mark.parametrize(("family", "rename"), LOADED, ids=[name for name, _ in LOADED])
def test_what_transformers_loads_cleanly_is_pruned(
    tiny_model: Tiny, tmp_path: Path, family: str, rename: Rename
) -> None:
    model = renamed(tiny_model(family), tmp_path, rename)
    _, keys = tiny.load(model)
    assert not keys["missing_keys"]
    assert not keys["unexpected_keys"]
    checkpoint = open_checkpoint(model)
    assert checkpoint.anatomy.prefix == rename(checkpoint.anatomy.family.prefix)
    kept = [[other for other in range(checkpoint.depth) if other != one] for one in range(checkpoint.depth)]
    removed = next(one for one in range(checkpoint.depth) if reason_against(checkpoint, kept[one]) is None)
    result = prune(str(model), out=tmp_path / "pruned", blocks=str(removed), verify=True, quiet=True)
    assert "bit for bit" in str(result.verified)
    _, keys = tiny.load(tmp_path / "pruned")
    assert not keys["missing_keys"]
    assert not keys["unexpected_keys"]


REFUSED: list[tuple[Rename, str, str]] = [
    (lambda name: f"_orig_mod.{name}", "_orig_mod.", "model._orig_mod.save_pretrained"),
    (lambda name: f"module.{name}", "module.", "model.module.save_pretrained"),
    (lambda name: f"base_model.model.{name}", "base_model.model.", "merge_and_unload"),
    (lambda name: f"language_model.{name}", "language_model.", "its language model alone"),
    (lambda name: f"policy.{name}", "policy.", "take 'policy.' off the front"),
    (lambda name: name.replace("mlp.", "_orig_mod.mlp."), "_orig_mod.", "model._orig_mod.save_pretrained"),
    (
        lambda name: name.replace("layers.1.", "layers.1._fsdp_wrapped_module."),
        "_fsdp_wrapped_module.",
        "full state dict",
    ),
]


@pytest.mark.fault(112)
@pytest.mark.parametrize(("rename", "prefix", "hint"), REFUSED)
def test_a_wrapper_is_named(built: Callable[..., Path], tmp_path: Path, rename: Rename, prefix: str, hint: str) -> None:
    model = renamed(built("llama"), tmp_path, rename)
    with pytest.raises(ShortstackError, match=f"tensor names have the prefix {prefix!r}") as refused:
        info(str(model))
    assert hint in refused.value.hint


def test_a_bare_base_model_is_still_taken(built: Callable[..., Path], tmp_path: Path) -> None:
    model = renamed(pico.build(tmp_path / "m", tie_word_embeddings=True), tmp_path, lambda n: n.removeprefix("model."))
    assert open_checkpoint(model).anatomy.prefix == "layers."
    with torch.no_grad():
        pico.load(model)


@pytest.mark.fault(112)
@pytest.mark.parametrize("part", ["base_layer.weight", "lora_A.default.weight", "modules_to_save.default.weight"])
def test_an_adapter_that_is_not_merged_is_named(built: Callable[..., Path], tmp_path: Path, part: str) -> None:
    model = renamed(built("llama"), tmp_path, lambda name: name.replace("q_proj.weight", f"q_proj.{part}"))
    with pytest.raises(ShortstackError, match=rf"a tensor is named .*q_proj\.{part}, as in PEFT's model") as refused:
        info(str(model))
    assert "merge_and_unload() of PEFT first" in refused.value.hint
