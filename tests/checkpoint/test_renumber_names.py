"""Quantized input: a block's tensors move together; names and patterns are renumbered in every form, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shortstack.checkpoint.renumber_names import Renumbering
from shortstack.errors import ShortstackError
from shortstack.families.open_model import open_checkpoint
from shortstack.pruning.plan import plan_for
from shortstack.pruning.prune import prune
from shortstack.scoring.score import score

Built = Callable[..., Path]


def gptq(model: Path, record: dict[str, Any]) -> Path:
    """The layout of a 4-bit GPTQ checkpoint: linear weights as packed integers, zero points, scales, group index."""
    tensors = load_file(model / "model.safetensors")
    packed: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if ".layers." in name and name.endswith("_proj.weight"):
            base, (rows, columns) = name.removesuffix(".weight"), tensor.shape
            packed[f"{base}.qweight"] = torch.randint(0, 1 << 30, (columns // 8, rows), dtype=torch.int32)
            packed[f"{base}.qzeros"] = torch.zeros(1, rows // 8, dtype=torch.int32)
            packed[f"{base}.scales"] = torch.rand(1, rows).half()
            packed[f"{base}.g_idx"] = torch.zeros(columns, dtype=torch.int32)
        else:
            packed[name] = tensor
    save_file(packed, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": record}))
    return model


def shortened(model: Path, blocks: str, out: Path) -> dict[str, Any]:
    prune(str(model), out=out, blocks=blocks, quiet=True)
    found: dict[str, Any] = json.loads((out / "config.json").read_text())["quantization_config"]
    return found


@pytest.mark.fault(29)
def test_a_blocks_tensors_move_together(copied: Built, tmp_path: Path) -> None:
    model = gptq(copied("llama"), {"quant_method": "gptq", "bits": 4, "group_size": 32})
    before = load_file(model / "model.safetensors")
    shortened(model, "1,3", tmp_path / "p")
    after = load_file(tmp_path / "p/model.safetensors")
    for new, old in enumerate((0, 2, 4, 5)):
        for ending in ("qweight", "qzeros", "scales", "g_idx"):
            name = "model.layers.{}.mlp.up_proj." + ending
            assert torch.equal(after[name.format(new)], before[name.format(old)])
    assert len([name for name in after if ".layers." in name]) == 4 * len([n for n in before if ".layers.0." in n])


@pytest.mark.fault(29)
@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            {"quant_method": "awq", "modules_to_not_convert": ["lm_head", "model.layers.1.mlp", "h.layers.4.mlp.up"]},
            {"modules_to_not_convert": ["lm_head", "h.layers.2.mlp.up"]},
        ),
        (
            {"quant_method": "compressed-tensors", "ignore": ["lm_head", "re:.*layers\\.5\\.mlp.*", "re:.*gate$"]},
            {"ignore": ["lm_head", "re:.*layers\\.3\\.mlp.*", "re:.*gate$"]},
        ),
        (
            {"quant_method": "gptq", "dynamic": {"-:model\\.layers\\.3\\..*": {}, "+:model\\.layers\\.2\\..*": {"bits": 8}}},
            {"dynamic": {"+:model\\.layers\\.1\\..*": {"bits": 8}}},
        ),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"targets": ["h.layers.2.up", "Linear"]}}},
            {"config_groups": {"group_0": {"targets": ["h.layers.1.up", "Linear"]}}},
        ),
        ({"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}, {}),
        ({"quant_method": "gptq", "dynamic": {"-:model\\.layers\\.\\d+\\.mlp.*": {}}}, {}),
    ],
)  # fmt: skip
def test_names_and_patterns_are_renumbered(
    copied: Built, tmp_path: Path, record: dict[str, Any], expected: dict[str, Any]
) -> None:
    """Blocks 1 and 3 go: 2 becomes 1, 4 becomes 2, 5 becomes 3."""
    found = shortened(gptq(copied("llama"), record), "1,3", tmp_path / "p")
    assert found == {**record, **expected}


@pytest.mark.fault(29)
@pytest.mark.parametrize("pattern", ["re:.*layers\\.[0-3]\\..*", "re:.*layers\\.(1|2)\\..*", "+:.*\\.18\\..*gate.*"])
def test_patterns_that_cannot_be_renumbered_are_refused(copied: Built, pattern: str) -> None:
    model = gptq(copied("llama"), {"quant_method": "compressed-tensors", "ignore": [pattern]})
    with pytest.raises(ShortstackError, match="may name blocks by number"):
        plan_for(open_checkpoint(model), blocks="1")


@pytest.mark.fault(29)
def test_an_unknown_method_is_refused(copied: Built) -> None:
    model = gptq(copied("llama"), {"quant_method": "something_new"})
    with pytest.raises(ShortstackError, match="quantized by 'something_new', which shortstack does not support"):
        plan_for(open_checkpoint(model), blocks="1")


@pytest.mark.fault(29)
def test_scores_need_full_weights(copied: Built) -> None:
    model = gptq(copied("llama"), {"quant_method": "gptq", "bits": 4})
    with pytest.raises(ShortstackError, match="is quantized; scores are computed on full-precision weights"):
        score(str(model), criterion="magnitude")


@pytest.mark.fault(27)
@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn])
def test_weights_of_a_wrong_type_without_a_record_of_quantization(copied: Built, dtype: torch.dtype) -> None:
    """fp8 passes only with its scales, which a record of quantization announces."""
    model = copied("llama")
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ShortstackError, match=r"layers\.2\.mlp\.up_proj\.weight is .*, expected floating-point weights"
    ):
        open_checkpoint(model)


@pytest.fixture(scope="module")
def renumber(built: Built) -> Renumbering:
    """Blocks 1 and 3 of 6 go: 2 becomes 1, 4 becomes 2, 5 becomes 3."""
    return Renumbering(open_checkpoint(built("llama")).anatomy, [0, 2, 4, 5], "here")


@pytest.mark.fault(98)
@pytest.mark.parametrize(
    ("name", "new"),
    [
        ("model.layers.2.mlp", "model.layers.1.mlp"),
        ("layers.4", "layers.2"),
        ("model/layers/4/mlp", "model/layers/2/mlp"),
        ("model.layers[5].mlp", "model.layers[3].mlp"),
        ("model_layers_4_mlp", "model_layers_2_mlp"),
        ("layer_2", "layer_1"),
        (r"^model\.layers\.4\.mlp$", r"^model\.layers\.2\.mlp$"),
        (r"re:^layers[.]5[.].*", r"re:^layers[.]3[.].*"),
        (r"(layers\.4)", r"(layers\.2)"),
        ("model.layers.4.mlp.experts.1.*", "model.layers.2.mlp.experts.1.*"),
        ("model.layers.3.mlp", None),
        ("layer_1", None),
        ("vision_tower.encoder.layers.4.mlp", "vision_tower.encoder.layers.4.mlp"),
        ("model.mtp.layers.0.mlp", "model.mtp.layers.0.mlp"),
        ("multilayers.4.mlp", "multilayers.4.mlp"),
        ("model.layers.*.mlp", "model.layers.*.mlp"),
    ],
)
def test_forms(renumber: Renumbering, name: str, new: str | None) -> None:
    assert renumber(name) == new


@pytest.mark.fault(98)
@pytest.mark.parametrize(
    "pattern", [r"re:layers\.4\d*\.mlp", r"layers\.1(0|2)\.mlp", "layers.4*", r"re:layers\.2\.a|layers\.4\.b"]
)
def test_patterns_that_may_mean_several_blocks(renumber: Renumbering, pattern: str) -> None:
    with pytest.raises(ShortstackError, match="may name blocks by number"):
        renumber(pattern)
