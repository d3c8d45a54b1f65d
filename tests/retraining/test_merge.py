"""Adapters folded into checkpoints: equal to base and adapter, or refused by name with nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shortstack.errors import ShortstackError
from shortstack.pruning.prune import prune
from shortstack.retraining.merge import merge
from tests import adapters, pico

Built = Callable[..., Path]
EXPERTS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "lora_dropout": 0.0}


def merged(base: Path, tmp_path: Path, **options: Any) -> Any:
    merge(tmp_path / "adapter", base=str(base), out=tmp_path / "out", **{"quiet": True, **options})
    return pico.load(tmp_path / "out")


def refused(base: Path, tmp_path: Path, says: str) -> ShortstackError:
    with pytest.raises(ShortstackError, match=says) as caught:
        merge(tmp_path / "adapter", base=str(base), out=tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()
    return caught.value


@pytest.mark.fault(97)
@pytest.mark.parametrize(
    ("family", "options", "settings"),
    [
        ("llama", {}, {"use_dora": True}),
        ("llama", {}, {"layers_to_transform": [1, 3], "rank_pattern": {"layers.3.self_attn.q_proj": 4}}),
        ("llama", {}, {"target_modules": ["q_proj", "embed_tokens"]}),
        ("llama", {}, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        ("llama", {"tie_word_embeddings": True}, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
        ("llama", {"tie_word_embeddings": True}, {"target_modules": ["q_proj"]}),
        ("mixtral", {}, {"target_modules": ["q_proj"], **EXPERTS}),
    ],
    ids=["dora", "patterns", "embedding", "trained copies", "tied embedding", "tied", "experts"],
)
def test_merged_is_base_and_adapter(
    built: Built, tmp_path: Path, family: str, options: dict[str, Any], settings: dict[str, Any]
) -> None:
    base = built(family, **options)
    expected = adapters.build(base, tmp_path / "adapter", **settings)
    model = merged(base, tmp_path)
    assert torch.allclose(adapters.logits(model), expected, atol=1e-4)
    assert not torch.allclose(adapters.logits(pico.load(base)), expected, atol=1e-2)
    assert (tmp_path / "out/config.json").read_bytes() == (base / "config.json").read_bytes()


@pytest.mark.fault(97)
@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=["both copies", "the head's copy", "factors of the embedding"],
)
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_tie_that_the_adapter_undoes_is_undone_in_the_config(
    built: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, settings: dict[str, Any]
) -> None:
    base = built(family, tie_word_embeddings=True)
    expected = adapters.build(base, tmp_path / "adapter", **settings)
    model = merged(base, tmp_path, quiet=False)
    assert torch.allclose(adapters.logits(model), expected, atol=1e-3)
    assert "head and embedding were one tensor" in capsys.readouterr().err
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    stored = load_file(tmp_path / "out/model.safetensors")
    assert not torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])


@pytest.mark.fault(95)
def test_an_adapter_of_the_dense_model_on_the_pruned_one(built: Built, tmp_path: Path) -> None:
    """Blocks 1 and 3 go: 2 becomes 1, 4 becomes 2, 5 becomes 3. The hint is then followed."""
    dense, pruned = built("llama"), tmp_path / "pruned"
    prune(str(dense), blocks="1,3", out=pruned, quiet=True)
    adapters.build(dense, tmp_path / "adapter")
    error = refused(
        pruned, tmp_path, r"adapts block 1, 3, which .*pruned .* lacks, and block 2, 4-5, which it has renumbered"
    )
    command = f"shortstack prune {dense} --blocks 1,3 --adapter {tmp_path / 'adapter'} --out DIR"
    assert error.hint.startswith(command)
    prune(str(dense), blocks="1,3", adapter=tmp_path / "adapter", out=tmp_path / "again", quiet=True)
    merge(tmp_path / "again/adapter", base=str(tmp_path / "again"), out=tmp_path / "out", quiet=True)


@pytest.mark.fault(95)
@pytest.mark.parametrize("named", ["the dense model", "a copy of it", "nothing"])
def test_blocks_that_the_pruned_model_has_too_under_other_numbers(built: Built, tmp_path: Path, named: str) -> None:
    """All of its numbers exist in the pruned model; what they mean is known from what the adapter was trained on."""
    import shutil

    dense, pruned = built("llama"), tmp_path / "pruned"
    prune(str(dense), blocks="0", out=pruned, quiet=True)
    blocks = [2, 3, 5] if named == "nothing" else [2, 3]
    adapters.build(dense, tmp_path / "adapter", layers_to_transform=blocks)
    base = {"the dense model": dense, "a copy of it": tmp_path / "copy", "nothing": None}[named]
    if named == "a copy of it":
        shutil.copytree(dense, tmp_path / "copy")
    adapters.configure(tmp_path / "adapter", base_model_name_or_path=str(base) if base else None)
    listed = "2-3, 5" if named == "nothing" else "2-3"
    error = refused(pruned, tmp_path, rf"adapts block {listed}, which .*pruned has renumbered")
    assert f"shortstack prune {base or dense} --blocks 0 --adapter" in error.hint


@pytest.mark.fault(95)
def test_an_adapter_of_the_pruned_model_fits_what_it_was_retrained_to(built: Built, tmp_path: Path) -> None:
    """Another directory of the same origin and blocks; and one that is no longer there."""
    prune(str(built("llama")), blocks="0", out=tmp_path / "pruned", quiet=True)
    for named in (str(tmp_path / "pruned"), "/no/longer/there"):
        expected = adapters.build(tmp_path / "pruned", tmp_path / "adapter")
        adapters.configure(tmp_path / "adapter", base_model_name_or_path=named)
        (tmp_path / "pruned").rename(tmp_path / "moved")
        found = adapters.logits(merged(tmp_path / "moved", tmp_path, force=True))
        assert torch.allclose(found, expected, atol=1e-4)
        (tmp_path / "moved").rename(tmp_path / "pruned")


def edited(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.fault(95)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.update({FIRST.replace(".0.", ".9."): t[FIRST].clone()}), "adapts block 9, which .* lacks"),
        (
            lambda t: t.update({FIRST.replace("q_", "x_"): t[FIRST].clone()}),
            r"1 of its tensors do not belong to .*x_proj",
        ),
        (lambda t: t.pop(FIRST), r"1 tensors that its config calls for are not in it.*q_proj\.lora_A"),
    ],
    ids=["beyond the depth", "no such layer", "lost"],
)
def test_tensors_without_a_place_and_places_without_a_tensor(
    built: Built, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], says: str
) -> None:
    adapters.build(built("llama"), tmp_path / "adapter")
    edited(tmp_path / "adapter", change)
    refused(built("llama"), tmp_path, says)


@pytest.mark.fault(97)
def test_settings_of_a_newer_peft(built: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is off is ignored, in a line; what is set is refused by name."""
    base = built("llama")
    expected = adapters.build(base, tmp_path / "adapter")
    adapters.configure(tmp_path / "adapter", a_setting_of_tomorrow=None, another=False)
    assert torch.allclose(adapters.logits(merged(base, tmp_path, quiet=False)), expected, atol=1e-4)
    assert "a_setting_of_tomorrow, another: unknown to PEFT" in capsys.readouterr().err
    adapters.configure(tmp_path / "adapter", a_setting_of_tomorrow="quick")
    with pytest.raises(
        ShortstackError, match="a_setting_of_tomorrow is 'quick', which PEFT .* does not support"
    ) as caught:
        merge(tmp_path / "adapter", base=str(base), out=tmp_path / "other", quiet=True)
    assert "pip install --upgrade peft" in caught.value.hint


@pytest.mark.fault(97)
def test_kinds_that_are_no_change_of_weights_are_refused_by_name(built: Built, tmp_path: Path) -> None:
    from peft import PrefixTuningConfig, get_peft_model

    settings = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(pico.load(built("llama")), settings).save_pretrained(tmp_path / "adapter")
    refused(built("llama"), tmp_path, "PREFIX_TUNING does not change the model's weights")
    adapters.configure(tmp_path / "adapter", peft_type="OF_TOMORROW")
    refused(built("llama"), tmp_path, "peft_type is 'OF_TOMORROW', which PEFT .* does not support")


@pytest.mark.fault(97)
def test_a_bias_that_the_base_has_no_place_for_is_refused_with_that_reason(built: Built, tmp_path: Path) -> None:
    adapters.build(built("llama"), tmp_path / "adapter", lora_bias=True)
    error = refused(built("llama"), tmp_path, "cannot be folded into .*no bias")
    assert "PEFT" in error.hint


@pytest.mark.fault(97)
def test_what_was_folded_is_compared_before_anything_is_written(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora import Linear

    adapters.build(built("llama"), tmp_path / "adapter")
    monkeypatch.setattr(Linear, "merge", lambda self, **_: None)
    refused(built("llama"), tmp_path, "its logits differ from base and adapter by up to")


def test_a_base_that_is_no_longer_there(built: Built, tmp_path: Path) -> None:
    adapters.build(built("llama"), tmp_path / "adapter")
    adapters.configure(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(ShortstackError, match="the base that it names cannot be opened") as caught:
        merge(tmp_path / "adapter", out=tmp_path / "out", quiet=True)
    assert caught.value.hint.startswith("give its current path with --base MODEL")


def test_a_quantized_base_is_refused(copied: Built, tmp_path: Path) -> None:
    model = copied("llama")
    adapters.build(model, tmp_path / "adapter")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    refused(model, tmp_path, "is quantized; an adapter can be folded only into full-precision weights")
