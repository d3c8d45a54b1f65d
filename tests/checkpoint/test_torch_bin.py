"""`.bin` checkpoints: read by position under `weights_only`, never executed, pruned to safetensors."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shortstack.checkpoint.torch_bin import read_pickled
from shortstack.errors import ShortstackError
from shortstack.families.open_model import open_checkpoint
from shortstack.pruning.prune import prune
from tests import pico
from tests.scoring.material import assert_equals_oracle, scored

Built = Callable[..., Path]


def as_bin(model: Path, *, shards: int = 1, share_head: bool = False) -> Path:
    """Turn a safetensors checkpoint into one of `.bin` files, as torch.save writes them."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    if share_head:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    if shards == 1:
        torch.save(tensors, model / "pytorch_model.bin")
        return model
    names = sorted(tensors)
    weight_map = {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        chosen = names[number::shards]
        torch.save({name: tensors[name] for name in chosen}, model / file)
        weight_map |= dict.fromkeys(chosen, file)
    (model / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return model


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pruned_to_safetensors_byte_for_byte(
    copied: Built, built: Built, tmp_path: Path, shards: int, dtype: torch.dtype
) -> None:
    model = as_bin(copied("llama", dtype=dtype), shards=shards)
    result = prune(str(model), out=tmp_path / "p", blocks="1,4", verify=True, quiet=True)
    assert result.verified is not None
    prune(str(built("llama", dtype=dtype)), out=tmp_path / "q", blocks="1,4", quiet=True)
    assert not list((tmp_path / "p").glob("*.bin*"))
    found: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "p").glob("*.safetensors"):
        found |= load_file(path)
    expected = load_file(tmp_path / "q/model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_scored_without_being_loaded(copied: Built) -> None:
    model = as_bin(copied("llama"), shards=2)
    windows = pico.windows()
    assert_equals_oracle(scored(model, windows, memory="streamed"), model, windows)


def test_removing_nothing_writes_safetensors(copied: Built, tmp_path: Path) -> None:
    import dataclasses

    from shortstack.pruning.plan import plan_for

    model = as_bin(copied("llama"))
    nothing = dataclasses.replace(plan_for(open_checkpoint(model), blocks="1").plan, removed=())
    prune(str(model), out=tmp_path / "p", plan=nothing, quiet=True)
    assert open_checkpoint(tmp_path / "p").depth == 6


def test_shared_storages(copied: Built, tmp_path: Path) -> None:
    """A tied head shares the embedding's storage: stored once, counted once, written once."""
    model = as_bin(copied("llama", tie_word_embeddings=True), share_head=True)
    checkpoint = open_checkpoint(model)
    assert checkpoint.tensors["lm_head.weight"].start == checkpoint.tensors["model.embed_tokens.weight"].start
    prune(str(model), out=tmp_path / "p", blocks="2", verify=True, quiet=True)
    assert "lm_head.weight" not in load_file(tmp_path / "p/model.safetensors")


def test_views_of_one_storage(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    torch.save({"a": whole, "rows": whole[1:3], "empty": torch.empty(0, 4)}, tmp_path / "x.bin")
    found = {tensor.name: tensor for tensor in read_pickled(tmp_path / "x.bin")[0]}
    assert found["rows"].start == found["a"].start + 6 * 4
    assert found["rows"].shape == (2, 6)
    assert found["empty"].nbytes == 0
    torch.save({"a": whole.T}, tmp_path / "t.bin")
    with pytest.raises(ShortstackError, match="strided view"):
        read_pickled(tmp_path / "t.bin")


class Evil:
    """What an attacker would put into a pickle."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


@pytest.mark.fault(37)
def test_code_in_a_pickle_is_never_run(copied: Built, tmp_path: Path) -> None:
    """Promise 5: refused with the file named, nothing executed."""
    model = copied("llama")
    tensors: dict[str, Any] = dict(load_file(model / "model.safetensors"))
    (model / "model.safetensors").unlink()
    torch.save({**tensors, "evil": Evil(tmp_path / "executed")}, model / "pytorch_model.bin")
    with pytest.raises(ShortstackError, match=r"pytorch_model\.bin: holds other objects than tensors") as caught:
        prune(str(model), out=tmp_path / "p", blocks="1", quiet=True)
    assert "was not loaded" in caught.value.message
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "p").exists()


@pytest.mark.fault(37)
def test_a_bare_pickle_is_never_run(copied: Built, tmp_path: Path) -> None:
    model = copied("llama")
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "executed")))
    with pytest.raises(ShortstackError, match="not a file that torch.save writes"):
        open_checkpoint(model)
    assert not (tmp_path / "executed").exists()


def test_damaged_files(copied: Built) -> None:
    model = as_bin(copied("llama"))
    path = model / "pytorch_model.bin"
    whole = path.read_bytes()
    for data, says in (
        (whole[: len(whole) // 2], "truncated or damaged"),
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git-LFS pointer"),
        (b"<!DOCTYPE html>", "not a file that torch.save writes"),
    ):
        path.write_bytes(data)
        with pytest.raises(ShortstackError, match=says):
            open_checkpoint(model)


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(100)}, tmp_path / "x.bin")
    with (
        zipfile.ZipFile(tmp_path / "x.bin") as old,
        zipfile.ZipFile(tmp_path / "y.bin", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.namelist():
            new.writestr(entry, old.read(entry))
    with pytest.raises(ShortstackError, match="is compressed"):
        read_pickled(tmp_path / "y.bin")


@pytest.mark.parametrize("holds", [[1, 2], {}, {"a": 3}, {"a": {"b": torch.ones(1)}}])
def test_what_is_no_state_dict(tmp_path: Path, holds: Any) -> None:
    torch.save(holds, tmp_path / "x.bin")
    with pytest.raises(ShortstackError, match=r"x\.bin: "):
        read_pickled(tmp_path / "x.bin")


def test_a_nested_state_dict(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(2)}}, tmp_path / "x.bin")
    assert [tensor.name for tensor in read_pickled(tmp_path / "x.bin")[0]] == ["a"]


def test_safetensors_are_preferred(copied: Built) -> None:
    model = copied("llama")
    (model / "pytorch_model.bin").write_bytes(b"not looked at")
    assert {path.name for path in open_checkpoint(model).shards} == {"model.safetensors"}
