"""What lies beside the weights of a pruned checkpoint: copied, renumbered, or left out and reported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shortstack.checkpoint.extra_files import EACH, NAMES, NUMBER, restates
from shortstack.checkpoint.reader import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.families.open_model import open_checkpoint
from shortstack.pruning.prune import prune

Built = Callable[..., Path]


def pruned(model: Path, tmp_path: Path, blocks: str = "1,3") -> set[str]:
    prune(str(model), blocks=blocks, out=tmp_path / "out")
    return {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}


@pytest.mark.fault(98)
def test_the_makers_own_form_is_left_out_and_reported(
    copied: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A repository of Mistral's: params.json, consolidated weights and a folder of the original beside ours."""
    model = copied("mistral")
    plain = pruned(model, tmp_path)
    (tmp_path / "out").rename(tmp_path / "plain")
    assert "not copied" not in capsys.readouterr().err
    (model / "params.json").write_text(json.dumps({"dim": 32, "n_layers": 6, "n_heads": 4}))
    for name in ("consolidated.00.pth", "imatrix.dat", "model.onnx_data", "weights.npz", "modeling_own.py"):
        (model / name).write_bytes(b"\0blk.0.attn_q.weight\0\0blk.1.attn_q.weight\0")
    (model / "original").mkdir()
    for name in ("tekken.json", "SYSTEM_PROMPT.txt"):
        (model / name).write_text('{"vocab": ["h.2", "h.3", "n_layers"]}')
    assert pruned(model, tmp_path) == plain | {"tekken.json", "SYSTEM_PROMPT.txt"}
    said = capsys.readouterr().err
    for part in (
        "params.json (states the number of blocks)", "consolidated.00.pth (another form of the weights)",
        "original/ (a folder)", "imatrix.dat (names blocks by number)", "model.onnx_data (another form",
        "weights.npz (another", "modeling_own.py (code)",
    ):  # fmt: skip
        assert part in said


@pytest.mark.fault(98)
@pytest.mark.parametrize("name", ["quantize_config.json", "hf_quant_config.json"])
def test_records_of_quantization_are_renumbered(
    copied: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    model = copied("llama")
    record = {"bits": 4, "quantization": {"exclude_modules": ["lm_head", "model.layers.1.mlp", "model.layers.4.mlp"]}}
    (model / name).write_text(json.dumps(record))
    pruned(model, tmp_path)
    found = json.loads((tmp_path / "out" / name).read_text())
    assert found == {"bits": 4, "quantization": {"exclude_modules": ["lm_head", "model.layers.2.mlp"]}}
    assert f"renumbered for the remaining blocks: {name}" in capsys.readouterr().err


@pytest.fixture(scope="module")
def checkpoint(built: Built) -> Checkpoint:
    return open_checkpoint(built("llama"))


@pytest.mark.fault(98)
@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("params.json", {"n_layers": 6}, NUMBER),
        ("mlc-chat-config.json", {"model_config": {"num_hidden_layers": 6}}, NUMBER),
        ("genai_config.json", {"model": {"decoder": {"num_hidden_layers": 6}}}, NUMBER),
        ("metadata.json", {"llama.block_count": 6}, NUMBER),
        ("merge.json", {"slices": [{"layer_range": [0, 6]}]}, NUMBER),
        ("model_config.yaml", "name: pico\nn_layer: 6\n", NUMBER),
        ("mergekit_config.yml", "slices:\n- sources:\n  - layer_range: [0, 6]\n    model: a\n", NUMBER),
        ("config.toml", "num_layers = 6\n", NUMBER),
        ("pattern.json", {"window_by_layer": [1, 2, 3, 4, 5, 6]}, EACH),
        ("kv_cache_scales.json", {"scaling_factor": {"0": {str(index): 0.5 for index in range(6)}}}, EACH),
        ("ndarray-cache.json", {"records": [{"name": "model.layers.0.mlp"}, {"name": "model.layers.1.mlp"}]}, NAMES),
        ("openvino_model.xml", '<layer name="model.layers.0.mlp.up"/><layer name="model.layers.1.mlp.up"/>', NAMES),
        ("recipe.yaml", 'ignore: ["model.layers.0.mlp", "model.layers.5.mlp"]', NAMES),
        ("params.json", {"n_layers": 7, "dim": 6}, None),
        ("trainer_state.json", {"epoch": 6, "log_history": []}, None),
        ("special_tokens_map.json", {"n_layers": 6}, None),
        ("tokenizer.json", {"added": {str(index): "" for index in range(6)}}, None),
        ("LICENSE", "Clause layers.1. and layers.2.", None),
        ("broken.json", "{", None),
    ],
)  # fmt: skip
def test_what_files_say_about_blocks(checkpoint: Checkpoint, name: str, content: Any, reason: str | None) -> None:
    data = content if isinstance(content, str) else json.dumps(content)
    assert restates(name, data.encode(), checkpoint.anatomy) == reason


@pytest.mark.fault(98)
def test_names_of_blocks_anywhere_in_the_config_are_renumbered(copied: Built, tmp_path: Path) -> None:
    """Such as `quantization` of MLX. Blocks 1 and 3 go: 2 becomes 1, 4 becomes 2."""
    model = copied("llama")
    config = json.loads((model / "config.json").read_text())
    own = {
        "bits": 4, "model.layers.1.mlp": {"bits": 8}, "model.layers.4.mlp": {"bits": 6}, "read_out_at": "model.layers.2",
        "vision_tower.layers.3.mlp": False,
    }  # fmt: skip
    (model / "config.json").write_text(json.dumps({**config, "quantization": own, "_name_or_path": "runs/layers_1/m"}))
    pruned(model, tmp_path)
    found = json.loads((tmp_path / "out/config.json").read_text())["quantization"]
    assert found == {
        "bits": 4, "model.layers.2.mlp": {"bits": 6}, "read_out_at": "model.layers.1", "vision_tower.layers.3.mlp": False
    }  # fmt: skip
    with pytest.raises(ShortstackError, match=r"names 'model\.layers\.2', a block that is removed"):
        prune(str(model), blocks="2", out=tmp_path / "other", quiet=True)
