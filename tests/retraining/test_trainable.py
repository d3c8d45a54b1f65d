"""What is trained is what was asked for, in every family; the rest stays as it was, to the byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shortstack.errors import UsageError
from shortstack.retraining.trainable import (
    LoRA,
    isolates_documents,
    projections,
    set_trainable,
    short_names,
    with_adapter,
    without_adapter,
)
from tests import pico
from tests.families import tiny

Built = Callable[..., Path]
Retrained = Callable[..., Any]

# family -> the linear layers of its blocks
SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
PROJECTIONS = {
    "llama": SEVEN,
    "mistral": SEVEN,
    "qwen2": SEVEN,
    "gemma2": SEVEN,
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "gpt_neox": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "opt": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    "falcon": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
}


@pytest.mark.parametrize("family", sorted(PROJECTIONS))
def test_the_projections_of_a_family(family: str, built: Built) -> None:
    model, checkpoint = pico.load(built(family)), tiny.open_checkpoint(built(family))
    found = projections(model, checkpoint)
    assert {name.rpartition(".")[2] for name in found} == PROJECTIONS[family]
    assert len(found) == 6 * len({name.partition(".5.")[2] for name in found if ".5." in name})
    assert set(short_names(model, found)) == PROJECTIONS[family]
    adapted = with_adapter(model, checkpoint, LoRA())
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(found)
    assert all("lora_" in name for name in trained)
    assert without_adapter(adapted, checkpoint) == ""


@pytest.mark.parametrize(
    ("asked", "adapted"),
    [
        ("q_proj,v_proj", {"self_attn.q_proj", "self_attn.v_proj"}),
        ("self_attn.o_proj", {"self_attn.o_proj"}),
        ("5.mlp.up_proj,k_proj", {"mlp.up_proj", "self_attn.k_proj"}),
    ],
)
def test_the_layers_that_get_an_adapter_are_those_that_were_named(asked: str, adapted: set[str], built: Built) -> None:
    model, checkpoint = pico.load(built("llama")), tiny.open_checkpoint(built("llama"))
    model = with_adapter(model, checkpoint, LoRA(target_modules=asked))
    found = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {name.partition(".layers.")[2].split(".lora_")[0].partition(".")[2] for name in found} == adapted
    up = [name for name in found if "up_proj" in name]
    assert all(".layers.5." in name for name in up), "a name with a block's number means that block alone"


@pytest.mark.fault(131)
@pytest.mark.parametrize("asked", ["q_porj", "lm_head", "proj", "mlp.q_proj"])
def test_a_target_module_that_no_layer_is(asked: str, built: Built) -> None:
    model, checkpoint = pico.load(built("llama")), tiny.open_checkpoint(built("llama"))
    with pytest.raises(UsageError, match=f"--target-modules {asked}: .* has no such linear layer") as error:
        with_adapter(model, checkpoint, LoRA(target_modules=f"v_proj,{asked}"))
    assert "q_proj" in error.value.hint
    for broken in ("", "q_proj,", "q_proj,q_proj", "q_proj, v_proj"):
        with pytest.raises(UsageError, match="target_modules=.*: expected names separated by commas, each once"):
            LoRA(target_modules=broken)


def test_the_router_of_a_mixture_is_left_alone(built: Built) -> None:
    model, checkpoint = pico.load(built("mixtral")), tiny.open_checkpoint(built("mixtral"))
    found = {name.rpartition(".")[2] for name in projections(model, checkpoint)}
    assert {"q_proj", "k_proj", "v_proj", "o_proj"} <= found
    assert not found & {"gate", "router"}


@pytest.mark.fault(97)
@pytest.mark.parametrize("dry_run", [True, False])
def test_experts_that_get_no_adapter_are_reported(
    built: Built, retrained: Retrained, tmp_path: Path, capsys: pytest.CaptureFixture[str], dry_run: bool
) -> None:
    model = built("mixtral", max_position_embeddings=512)
    retrained("lora", tmp_path / "out", model=model, max_steps=1, quiet=False, dry_run=dry_run)
    said = capsys.readouterr().err
    assert "no adapter on mlp.experts.down_proj, mlp.experts.gate_up_proj, mlp.gate.weight (" in said
    assert "% of the blocks' parameters): LoRA adapts only linear layers; retrain cpt trains all" in said


PARTS = {
    "all": lambda name: True,
    "last:2": lambda name: "layers.4." in name or "layers.5." in name,
    "first:1": lambda name: "layers.0." in name,
    "head": lambda name: name == "lm_head.weight",
    "norm": lambda name: name == "model.norm.weight",
    "embeddings": lambda name: name == "model.embed_tokens.weight",
    "last:3,head,norm": lambda name: (
        name in ("lm_head.weight", "model.norm.weight") or any(f"layers.{n}." in name for n in (3, 4, 5))
    ),
}


@pytest.mark.parametrize("what", sorted(PARTS))
def test_a_part_is_that_part(what: str, built: Built) -> None:
    model, checkpoint = pico.load(built("llama")), tiny.open_checkpoint(built("llama"))
    trained = set_trainable(model, checkpoint, what)
    assert trained == [name for name, _ in model.named_parameters() if PARTS[what](name)]
    assert trained == [name for name, parameter in model.named_parameters() if parameter.requires_grad]


FINAL_NORMS = {
    "gpt2": ["transformer.ln_f.weight", "transformer.ln_f.bias"],
    "opt": ["model.decoder.final_layer_norm.weight", "model.decoder.final_layer_norm.bias"],
    "gpt_neox": ["gpt_neox.final_layer_norm.weight", "gpt_neox.final_layer_norm.bias"],
    "gemma2": ["model.norm.weight"],
}


@pytest.mark.parametrize("family", sorted(FINAL_NORMS))
def test_the_final_norm_of_other_families(family: str, built: Built) -> None:
    model, checkpoint = pico.load(built(family)), tiny.open_checkpoint(built(family))
    assert set_trainable(model, checkpoint, "norm") == FINAL_NORMS[family]


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("last:7", "the model has 6 blocks"),
        ("last:0", "the model has 6 blocks"),
        ("last:x", "unknown"),
        ("heads", "unknown"),
        ("", "unknown"),
        ("all,head", "unknown"),
    ],
)
def test_no_such_part(what: str, says: str, built: Built) -> None:
    with pytest.raises(UsageError, match=says):
        set_trainable(pico.load(built("llama")), tiny.open_checkpoint(built("llama")), what)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "mistral"])
def test_rotary_families_keep_documents_apart(family: str, built: Built) -> None:
    assert isolates_documents(pico.load(built(family)), pico.VOCABULARY)


def test_where_documents_are_not_kept_apart_it_is_seen(built: Built) -> None:
    model = pico.load(built("llama"))
    real = model.forward

    def together(**given: Any) -> Any:
        return real(**{key: value for key, value in given.items() if key != "position_ids"})

    model.forward = together
    assert not isolates_documents(model, pico.VOCABULARY)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")


def test_frozen_stays_frozen_to_the_byte(retrained: Retrained, pruned: Path, tmp_path: Path) -> None:
    retrained("cpt", tmp_path / "out", train="last:1,norm", max_steps=3)
    before, after = weights(pruned), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "layers.3." in name or name == "model.norm.weight"}


def test_adapters_leave_what_they_are_not_on(retrained: Retrained, pruned: Path, tmp_path: Path) -> None:
    retrained("lora", tmp_path / "out", max_steps=3)
    before, after = weights(pruned), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.split(".")[-2] in SEVEN}


def test_tied_weights_stay_tied(retrained: Retrained, built: Built, tmp_path: Path) -> None:
    model = built("llama", tie_word_embeddings=True, max_position_embeddings=512)
    retrained("cpt", tmp_path / "out", model=model, max_steps=3)
    after = weights(tmp_path / "out")
    assert "lm_head.weight" not in after
    assert not torch.equal(after["model.embed_tokens.weight"], weights(model)["model.embed_tokens.weight"])
    loaded = pico.load(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
