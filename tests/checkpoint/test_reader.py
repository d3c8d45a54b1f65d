"""Opening a checkpoint: whatever is wrong is said in a line that names the place, before any tensor is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shortstack.errors import ShortstackError
from shortstack.families.open_model import open_checkpoint
from shortstack.inspection.info import info
from tests import pico

Built = Callable[..., Path]


def edit(model: Path, **entries: Any) -> None:
    path = model / "config.json"
    config = {**json.loads(path.read_text()), **entries}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def retensor(model: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("options", [{}, {"shard_bytes": 40_000}, {"tie_word_embeddings": True}])
def test_counts_equal_those_of_the_model(built: Built, options: dict[str, Any]) -> None:
    directory = built("llama", **options)
    model = pico.load(directory)
    facts = info(str(directory))
    assert facts.parameters == sum(p.numel() for p in model.parameters())
    assert facts.parameters_per_block == [sum(p.numel() for p in block.parameters()) for block in model.model.layers]
    assert facts.parameters_embedding == model.model.embed_tokens.weight.numel()
    assert facts.parameters_head == (0 if options.get("tie_word_embeddings") else model.lm_head.weight.numel())
    assert facts.tied == bool(options.get("tie_word_embeddings"))
    assert facts.shards == len(list(directory.glob("*.safetensors")))
    assert facts.nbytes == sum(t.nbytes for path in directory.glob("*.safetensors") for t in load_file(path).values())
    assert facts.blocks == 6
    assert "llama" in facts.to_text()


@pytest.mark.parametrize("family", sorted(pico.FAMILIES))
def test_counts_of_every_family(built: Built, family: str) -> None:
    model = pico.load(built(family))
    assert info(str(built(family))).parameters == sum(p.numel() for p in model.parameters())


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(ShortstackError, match="no such directory"):
        open_checkpoint(tmp_path / "nowhere")


def test_a_name_that_could_be_a_hub_id_is_looked_for_there() -> None:
    with pytest.raises(
        ShortstackError, match="no-such-organization/no-such-model: no such directory, and HF_HUB_OFFLINE is set"
    ):
        open_checkpoint("no-such-organization/no-such-model")


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(ShortstackError, match="is a file, expected a model's directory or a hub id"):
        open_checkpoint(tmp_path / "x")


def test_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(ShortstackError, match=r"not a checkpoint \(no config.json\)"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": "lla', r"config.json: not valid JSON.*line 1"),
        ("[]", "expected a JSON object"),
        ("{}", "no model_type"),
        ('{"model_type": "unheard_of"}', "family 'unheard_of' is not in shortstack's table"),
        ("[" * 200_000, "not valid JSON"),
    ],
)
@pytest.mark.fault(32, 33)
def test_bad_config(copied: Built, text: str, message: str) -> None:
    model = copied("llama")
    (model / "config.json").write_text(text)
    with pytest.raises(ShortstackError, match=message):
        open_checkpoint(model)


def test_unknown_family_says_how_to_add_one(copied: Built) -> None:
    model = copied("llama")
    edit(model, model_type="mystery")
    with pytest.raises(ShortstackError) as caught:
        open_checkpoint(model)
    assert "docs/adding-a-family.md" in caught.value.hint
    assert (Path(__file__).parents[2] / "docs/adding-a-family.md").is_file()


@pytest.mark.parametrize("count", [-1, 0, "6", 6.0, True, None])
@pytest.mark.fault(21)
def test_depth_that_is_no_number(copied: Built, count: Any) -> None:
    model = copied("llama")
    edit(model, num_hidden_layers=count)
    with pytest.raises(ShortstackError, match="num_hidden_layers is .*, expected a whole number >= 1"):
        open_checkpoint(model)


@pytest.mark.fault(19)
def test_config_claims_more_blocks(copied: Built) -> None:
    model = copied("llama")
    edit(model, num_hidden_layers=8)
    with pytest.raises(ShortstackError, match="says 8 blocks, but the weights lack block 6-7"):
        open_checkpoint(model)


@pytest.mark.fault(20)
def test_config_claims_fewer_blocks(copied: Built) -> None:
    model = copied("llama")
    edit(model, num_hidden_layers=4)
    with pytest.raises(ShortstackError, match="says 4 blocks, but the weights also hold block 4-5"):
        open_checkpoint(model)


@pytest.mark.fault(22)
def test_a_gap_in_the_blocks(copied: Built) -> None:
    model = copied("llama")
    retensor(model, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers.2." in name])  # type: ignore[func-returns-value]
    with pytest.raises(ShortstackError, match="lack block 2"):
        open_checkpoint(model)


@pytest.mark.fault(24)
def test_list_of_another_length(copied: Built) -> None:
    model = copied("qwen2")
    edit(model, layer_types=["full_attention"] * 5)
    with pytest.raises(ShortstackError, match="layer_types has 5 entries for 6 blocks"):
        open_checkpoint(model)


@pytest.mark.fault(23)
def test_width_that_contradicts_the_weights(copied: Built) -> None:
    model = copied("llama")
    edit(model, hidden_size=64)
    with pytest.raises(ShortstackError, match=r"embed_tokens.weight is \[260, 32\], config.json says \[260, 64\]"):
        open_checkpoint(model)


@pytest.mark.fault(30)
def test_untied_without_a_head(copied: Built) -> None:
    model = copied("llama", tie_word_embeddings=True)
    edit(model, tie_word_embeddings=False)
    with pytest.raises(ShortstackError, match=r"the weights lack lm_head.weight"):
        open_checkpoint(model)


@pytest.mark.fault(31)
def test_tied_with_another_head(copied: Built) -> None:
    model = copied("llama")
    edit(model, tie_word_embeddings=True)
    with pytest.raises(ShortstackError, match="differs from the embedding"):
        open_checkpoint(model)


def test_tied_head_stored_twice_is_counted_once(copied: Built) -> None:
    model = copied("llama", tie_word_embeddings=True)
    before = info(str(model)).parameters
    retensor(model, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert info(str(model)).parameters == before


@pytest.mark.fault(27)
def test_integer_weights(copied: Built) -> None:
    model = copied("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    retensor(model, lambda tensors: tensors.update({name: tensors[name].to(torch.int32)}))
    with pytest.raises(ShortstackError, match="is I32, expected floating-point weights"):
        open_checkpoint(model)


class TestShards:
    @pytest.fixture
    def model(self, copied: Built) -> Path:
        return copied("llama", shard_bytes=40_000)

    @staticmethod
    def shard(model: Path, number: int) -> Path:
        return sorted(model.glob("model-*.safetensors"))[number - 1]

    def index(self, model: Path, change: Callable[[dict[str, str]], None]) -> None:
        path = model / "model.safetensors.index.json"
        record = json.loads(path.read_text())
        change(record["weight_map"])
        path.write_text(json.dumps(record))

    @pytest.mark.fault(13)
    def test_missing(self, model: Path) -> None:
        path = self.shard(model, 2)
        path.rename(model / "elsewhere")
        with pytest.raises(ShortstackError, match=f"shard missing: {path.name}"):
            open_checkpoint(model)

    @pytest.mark.fault(1)
    def test_truncated(self, model: Path) -> None:
        path = self.shard(model, 2)
        path.write_bytes(path.read_bytes()[:-7])
        with pytest.raises(ShortstackError, match=path.name + r": truncated: has \d+ bytes, expected"):
            open_checkpoint(model)

    def test_lies_about_its_size(self, model: Path) -> None:
        path = self.shard(model, 2)
        path.write_bytes(path.read_bytes() + b"more")
        with pytest.raises(ShortstackError, match="4 bytes after the last tensor"):
            open_checkpoint(model)

    @pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ""])
    @pytest.mark.fault(10, 11)
    def test_path_instead_of_a_name(self, model: Path, name: str) -> None:
        self.index(model, lambda names: names.update({"lm_head.weight": name}))
        with pytest.raises(ShortstackError, match="must be a plain file name"):
            open_checkpoint(model)

    @pytest.mark.fault(14)
    def test_index_omits_a_tensor(self, model: Path) -> None:
        self.index(model, lambda names: names.pop("model.norm.weight") and None)
        with pytest.raises(ShortstackError, match=r"does not name 'model.norm.weight'"):
            open_checkpoint(model)

    @pytest.mark.fault(15)
    def test_index_names_another_shard(self, model: Path) -> None:
        other = self.shard(model, 1).name
        self.index(model, lambda names: names.update({"model.norm.weight": other}))
        with pytest.raises(ShortstackError, match=f"says 'model.norm.weight' is in {other}"):
            open_checkpoint(model)

    @pytest.mark.fault(16)
    def test_tensor_in_two_shards(self, model: Path) -> None:
        paths = sorted(model.glob("model-*.safetensors"))
        first, last = load_file(paths[0]), load_file(paths[-1])
        name = next(iter(last))
        save_file({**first, name: last[name]}, paths[0], metadata={"format": "pt"})
        with pytest.raises(ShortstackError, match="is also in"):
            open_checkpoint(model)

    @pytest.mark.fault(18)
    def test_single_file_and_index(self, model: Path) -> None:
        (model / "model.safetensors").write_bytes((self.shard(model, 1)).read_bytes())
        with pytest.raises(ShortstackError, match="ambiguous"):
            open_checkpoint(model)


def test_no_weights(copied: Built) -> None:
    model = copied("llama")
    (model / "model.safetensors").unlink()
    with pytest.raises(ShortstackError, match="no weights"):
        open_checkpoint(model)


def test_fingerprint_sees_config_names_and_bytes(copied: Built) -> None:
    model = copied("llama")
    seen = {open_checkpoint(model).fingerprint}
    edit(model, rope_theta=5.0)
    seen.add(open_checkpoint(model).fingerprint)
    data = bytearray((model / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (model / "model.safetensors").write_bytes(data)
    seen.add(open_checkpoint(model).fingerprint)
    assert len(seen) == 3


def test_provenance_of_another_checkpoint(copied: Built) -> None:
    model = copied("llama")
    (model / "shortstack.json").write_text('{"kept_blocks": [0, 1, 2]}')
    with pytest.raises(ShortstackError, match="lists 3 kept blocks, the checkpoint has 6"):
        open_checkpoint(model)
