"""Configs and tensors of the shortened checkpoint: what few families need, on raw configs as the hub has them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shortstack.checkpoint.byte_copy import TensorCopy
from shortstack.checkpoint.drop_blocks import shortened_config
from shortstack.checkpoint.headers import TensorInfo
from shortstack.errors import ShortstackError
from shortstack.families.open_model import open_checkpoint
from shortstack.pruning.plan import plan_for
from shortstack.pruning.prune import prune
from tests import pico

Built = Callable[..., Path]


def edit(model: Path, **entries: Any) -> Path:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    return model


@pytest.mark.fault(25)
@pytest.mark.parametrize("name", ["model.layers.6.eh_proj.weight", "mtp.layers.0.self_attn.q_proj.weight"])
def test_multi_token_prediction_is_dropped_and_said(
    copied: Built, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Renumbered into range, such a block would be loaded as a real one."""
    model = edit(copied("llama"), num_nextn_predict_layers=1)
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, name: torch.ones(4, 4)}, model / "model.safetensors", metadata={"format": "pt"})
    assert open_checkpoint(model).parameters() == sum(tensor.numel() for tensor in tensors.values())
    result = prune(str(model), out=tmp_path / "p", blocks="1", verify=name.startswith("mtp"))
    assert "multi-token-prediction weights are left out (1 tensors" in capsys.readouterr().err
    assert name not in load_file(tmp_path / "p/model.safetensors")
    assert json.loads((tmp_path / "p/config.json").read_text())["num_nextn_predict_layers"] == 0
    assert result.plan.after["bytes"] == open_checkpoint(tmp_path / "p").nbytes


@pytest.mark.fault(20)
def test_blocks_beyond_the_count_that_nothing_announces(copied: Built) -> None:
    model = copied("llama")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.6.mlp.up_proj.weight"] = torch.ones(4, 4)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ShortstackError, match="config.json says 6 blocks, but the weights also hold block 6"):
        open_checkpoint(model)


@pytest.mark.fault(24)
@pytest.mark.parametrize(
    ("family", "entries"),
    [
        ("llama", {"layer_types": ["full_attention"] * 5}),
        ("llama", {"mlp_layer_types": ["dense"] * 7}),
        ("smollm3", {"no_rope_layers": [1, 0, 1]}),
        ("hunyuan_v1_moe", {"moe_topk": [1, 2, 1]}),
    ],
)
def test_lists_of_another_length(copied: Built, tiny_model: Any, tmp_path: Path, family: str, entries: Any) -> None:
    """transformers does not check all of them: a wrong length can mean random weights, or a silently wrong model."""
    import shutil

    model = copied("llama") if family == "llama" else Path(shutil.copytree(tiny_model(family), tmp_path / "tiny"))
    with pytest.raises(ShortstackError, match=f"{next(iter(entries))} has . entries for 6 blocks"):
        open_checkpoint(edit(model, **entries))


@pytest.mark.parametrize(
    ("config", "kept", "expected"),
    [
        (  # DeepSeek: the first blocks are dense
            {"model_type": "deepseek_v3", "num_hidden_layers": 6, "first_k_dense_replace": 2, "num_nextn_predict_layers": 1},
            [1, 2, 3, 5],
            {"num_hidden_layers": 4, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0},
        ),
        (  # the default of transformers counts where the config says nothing
            {"model_type": "glm4_moe", "num_hidden_layers": 6}, [1, 2], {"num_hidden_layers": 2, "first_k_dense_replace": 0},
        ),
        (
            {"model_type": "qwen3_moe", "num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [1]},
            [0, 1, 3, 5],
            {"num_hidden_layers": 4, "decoder_sparse_step": 1, "mlp_only_layers": [0, 1]},
        ),
        (
            {"model_type": "qwen3_moe", "num_hidden_layers": 6, "decoder_sparse_step": 1, "mlp_only_layers": []},
            [0, 5], {"num_hidden_layers": 2},
        ),
        (
            {"model_type": "llama4_text", "num_hidden_layers": 4, "interleave_moe_layer_step": 2},
            [0, 2, 3],
            {"num_hidden_layers": 3, "moe_layers": [2], "no_rope_layers": [1, 1, 0]},
        ),
        (
            {"model_type": "bamba", "num_hidden_layers": 4, "attn_layer_indices": [1, 3]}, [0, 3],
            {"num_hidden_layers": 2, "attn_layer_indices": [1]},
        ),
        (
            {"model_type": "nemotron_h", "hybrid_override_pattern": "M*E-"}, [1, 2],
            {"hybrid_override_pattern": "*E"},
        ),
        (
            {"model_type": "kimi_linear", "num_hidden_layers": 4,
             "linear_attn_config": {"full_attn_layers": [2, 4], "kda_layers": [1, 3]}, "first_k_dense_replace": 1},
            [0, 2, 3],
            {"num_hidden_layers": 3, "first_k_dense_replace": 1,
             "linear_attn_config": {"full_attn_layers": [3], "kda_layers": [1, 2]}},
        ),
        (
            {"model_type": "longcat_flash", "num_layers": 4, "num_hidden_layers": 8}, [0, 3],
            {"num_layers": 2, "num_hidden_layers": 4},
        ),
        (
            {"model_type": "gpt_neo", "num_layers": 4, "attention_types": [[["global", "local"], 2]]}, [0, 2],
            {"num_layers": 2, "attention_types": [[["global"], 1], [["global"], 1]]},
        ),
        (  # a dict by block number
            {"model_type": "llama", "num_hidden_layers": 3, "per_layer_config": {"0": {"a": 1}, "2": {"a": 3}}}, [1, 2],
            {"num_hidden_layers": 2, "per_layer_config": {"1": {"a": 3}}},
        ),
        (  # a composite: the language model's own config is edited, nothing else
            {"model_type": "gemma3", "text_config": {"num_hidden_layers": 7, "sliding_window": 4}, "vision_config": {"a": 1}},
            [0, 5, 6],
            {"text_config": {"num_hidden_layers": 3, "sliding_window": 4,
                             "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}},
        ),
    ],
)  # fmt: skip
def test_configs_as_the_hub_has_them(config: dict[str, Any], kept: list[int], expected: dict[str, Any]) -> None:
    found = shortened_config(checkpoint_of(config), kept)
    assert found == {**config, **expected}


def checkpoint_of(config: dict[str, Any]) -> Any:
    """A checkpoint of a config alone: what the rules of configs see."""
    from shortstack.checkpoint.anatomy import Anatomy, depth_of
    from shortstack.checkpoint.reader import Checkpoint
    from shortstack.families.table import FAMILIES

    family = FAMILIES[config["model_type"]]
    anatomy = Anatomy(family, family.prefix, depth_of(config, family, "here"), family.embedding, family.head)
    return Checkpoint(Path("/nowhere"), "here", config, b"", {}, {}, anatomy, tuple(range(anatomy.depth)))


def test_unimplied_lists_are_not_written_where_the_rule_still_says_the_same() -> None:
    """A suffix removed from a periodic pattern needs no list: the config stays as users know it."""
    config = {"model_type": "gemma2", "num_hidden_layers": 6}
    assert shortened_config(checkpoint_of(config), [0, 1, 2, 3]) == {**config, "num_hidden_layers": 4}


@pytest.mark.parametrize(
    ("shape", "sliced", "expected"),
    [
        ((4, 6), (0, ((1, 2), (3, 4))), lambda x: x[[1, 3]]),
        ((4, 6), (1, ((0, 2), (4, 6))), lambda x: x[:, [0, 1, 4, 5]]),
        ((3000, 2000), (1, ((0, 500), (1500, 2000))), lambda x: x[:, [*range(500), *range(1500, 2000)]]),
        ((2, 1_200_000), (1, ((1, 2), (40, 1_150_000))), lambda x: x[:, [1, *range(40, 1_150_000)]]),
        ((5, 6, 7), (1, ((1, 2), (4, 6))), lambda x: x[:, [1, 4, 5]]),
        ((7, 3), (1, ()), lambda x: x[:, []]),
    ],
)
def test_slices_of_tensors(tmp_path: Path, shape: tuple[int, ...], sliced: Any, expected: Any) -> None:
    """Also where a piece of 4 MiB ends inside a row, rows of columns are read in several pieces, or nothing is kept."""
    from shortstack.checkpoint.byte_copy import copied_bytes

    values = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
    (tmp_path / "x").write_bytes(b"head" + values.numpy().tobytes())
    source = TensorInfo("x", "F32", shape, tmp_path / "x", 4, values.numel() * 4)
    copy = TensorCopy(source, "y", sliced)
    assert copy.shape == tuple(expected(values).shape)
    assert b"".join(copied_bytes(copy)) == expected(values).contiguous().numpy().tobytes()
    assert copy.nbytes == len(b"".join(copied_bytes(copy)))


def test_blocks_that_cannot_go_are_passed_by(tiny_model: Any) -> None:
    """A plan from scores takes the next block instead, and says so."""
    from shortstack.artifacts.scores import CriterionScores, Scores

    checkpoint = open_checkpoint(tiny_model("modernbert-decoder"))
    criterion = CriterionScores("ppl", (1.0, 2.0, 3.0, 4.0, 5.0, 6.0), tuple(range(6)))
    scores = Scores("x", checkpoint.fingerprint, tuple(range(6)), {"ppl": criterion})
    made = plan_for(checkpoint, scores=scores, remove=2).plan
    assert made.removed == (1, 2)
    assert "block 0 stays, though its score is lower" in made.note
    run = plan_for(checkpoint, scores=scores, remove=2, strategy="contiguous").plan
    assert run.removed == (1, 2)
    with pytest.raises(ShortstackError, match="only 5 blocks can be removed exactly|5 of 6 are removable"):
        plan_for(checkpoint, scores=scores, remove=6)


def test_known_families_are_pruned_without_torch_or_transformers(built: Built, tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from shortstack.cli.app import run; code = run(sys.argv[1:]);"
        "heavy = {'torch', 'transformers'} & set(sys.modules); sys.exit(str(heavy) if heavy else code)"
    )
    arguments = ["prune", str(built("gemma3_text")), "--blocks", "1", "--out", str(tmp_path / "p")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert pico.load(tmp_path / "p").config.layer_types.count("full_attention") == 2
