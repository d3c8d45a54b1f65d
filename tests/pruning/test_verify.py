"""The proof must fail when anything was altered: each of these passes without the alteration."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from shortstack.engine.block_model import NotSeparableError
from shortstack.errors import ShortstackError
from shortstack.families.open_model import open_checkpoint
from shortstack.pruning.plan import plan_for
from shortstack.pruning.prune import prune, write_pruned
from shortstack.pruning.verify import verify_pruned

Built = Callable[..., Path]


def made(model: Path, out: Path, blocks: str = "1,3") -> Any:
    checkpoint = open_checkpoint(model)
    planned = plan_for(checkpoint, blocks=blocks)
    out.mkdir()
    write_pruned(checkpoint, planned, out)
    return lambda: verify_pruned(checkpoint, planned, out)


def test_passes_unaltered(built: Built, tmp_path: Path) -> None:
    assert "equal bit for bit" in made(built("qwen2"), tmp_path / "p")().says


def test_streamed_when_two_models_do_not_fit(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shortstack.pruning.verify.available_bytes", lambda: 1000)
    assert "the streaming engine" in made(built("qwen2"), tmp_path / "p")().says


def test_what_could_not_be_compared_is_in_the_text(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prune(str(built("qwen2")), out=tmp_path / "whole", blocks="1", verify=True, quiet=True)
    assert whole.to_json()["logits_compared"] is True
    assert "\nverified: " in whole.to_text()

    def not_separable(*_: object) -> Any:
        raise NotSeparableError("m", "its blocks pass state to one another")

    monkeypatch.setattr("shortstack.pruning.verify.available_bytes", lambda: 1000)
    monkeypatch.setattr("shortstack.engine.streamed.streamed_logits", not_separable)
    part = prune(str(built("qwen2")), out=tmp_path / "part", blocks="1", verify=True, quiet=True)
    assert part.to_json()["logits_compared"] is False
    assert "verified: " not in part.to_text()
    assert "\nverified in part: " in part.to_text()
    assert "logits not compared: the model does not fit in memory twice, and its blocks pass state" in part.to_text()
    none = prune(str(built("qwen2")), out=tmp_path / "none", blocks="1", quiet=True)
    assert none.to_json()["logits_compared"] is None
    assert "verified" not in none.to_text()


def test_one_byte_of_a_kept_tensor(built: Built, tmp_path: Path) -> None:
    verify = made(built("llama"), tmp_path / "p")
    path = tmp_path / "p/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShortstackError, match="verification failed: tensor"):
        verify()


def test_one_renumbering(built: Built, tmp_path: Path) -> None:
    verify = made(built("llama"), tmp_path / "p")
    path = tmp_path / "p/model.safetensors"
    tensors = load_file(path)
    first, second = (f"model.layers.{i}.mlp.up_proj.weight" for i in (1, 2))
    tensors[first], tensors[second] = tensors[second], tensors[first]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ShortstackError, match="verification failed: tensor"):
        verify()


def test_one_per_block_config_entry(built: Built, tmp_path: Path) -> None:
    verify = made(built("qwen2"), tmp_path / "p")
    path = tmp_path / "p/config.json"
    config = json.loads(path.read_text())
    kinds = config["layer_types"]
    kinds[0], kinds[-1] = kinds[-1], kinds[0]
    path.write_text(json.dumps(config))
    with pytest.raises(ShortstackError, match=r"verification failed: config\.json: layer_types"):
        verify()


@pytest.mark.parametrize("streamed", [False, True])
def test_logits_alone_see_a_wrong_config(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    """The comparison of logits stands on its own, whatever the comparison of configs says."""
    if streamed:
        monkeypatch.setattr("shortstack.pruning.verify.available_bytes", lambda: 1000)
    monkeypatch.setattr("shortstack.pruning.verify.compare_config", lambda *_: None)
    verify = made(built("qwen2"), tmp_path / "p")
    path = tmp_path / "p/config.json"
    config = json.loads(path.read_text())
    config["layer_types"] = config["layer_types"][::-1]
    path.write_text(json.dumps(config))
    with pytest.raises(ShortstackError, match="logits differ"):
        verify()


def test_a_failed_check_publishes_nothing(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> str:
        raise ShortstackError("verification failed: on purpose")

    monkeypatch.setattr("shortstack.pruning.verify.verify_pruned", fail)
    with pytest.raises(ShortstackError, match="on purpose"):
        prune(str(built("llama")), out=tmp_path / "p", blocks="1", verify=True, quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_what_transformers_cannot_load_is_an_error_of_one_line(copied: Built, tmp_path: Path) -> None:
    model = copied("llama")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "hidden_act": "no_such_function"}))
    with pytest.raises(ShortstackError, match="transformers cannot load it"):
        prune(str(model), out=tmp_path / "p", blocks="1", verify=True, quiet=True)
    assert not (tmp_path / "p").exists()
