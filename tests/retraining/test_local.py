"""Training block by block: what a request may not be, and which dense model it is trained towards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shortstack.errors import ShortstackError
from shortstack.families.open_model import open_checkpoint
from shortstack.pruning.prune import prune
from tests.kills import hashes
from tests.retraining.conftest import LONG

Retrained = Callable[..., Any]
Built = Callable[..., Path]


def test_a_dense_model_that_is_not_the_one_is_refused(
    retrained: Retrained, built: Built, pruned: Path, dense: Path, tmp_path: Path
) -> None:
    other = built("llama", seed=1, **LONG)
    with pytest.raises(ShortstackError, match="is not the model that .* was pruned from") as error:
        retrained("local", tmp_path / "out", of=str(other))
    assert error.value.hint.startswith("--of ")
    bare = tmp_path / "bare"
    shutil.copytree(pruned, bare)
    (bare / "shortstack.json").unlink()
    for model, of in ((bare, str(dense)), (bare, None), (dense, str(dense))):
        with pytest.raises(ShortstackError, match=r"has no shortstack\.json"):
            retrained("local", tmp_path / "out", model=model, of=of)
    again = tmp_path / "again"
    prune(str(pruned), blocks="5", out=again, quiet=True)
    with pytest.raises(ShortstackError, match="is not the model"):
        retrained("local", tmp_path / "out", model=pruned, of=str(again))
    with pytest.raises(ShortstackError, match="there is no cut to repair"):
        retrained("local", tmp_path / "out", model=pruned, of=str(pruned))
    retrained("local", tmp_path / "out", model=again, of=str(pruned))  # pruned twice: the one between is in its history


def test_a_quantized_dense_model_is_refused(retrained: Retrained, dense: Path, pruned: Path, tmp_path: Path) -> None:
    quantized, model = tmp_path / "quantized", tmp_path / "model"
    shutil.copytree(dense, quantized)
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (quantized / "config.json").write_text(json.dumps(config))
    shutil.copytree(pruned, model)
    record = json.loads((model / "shortstack.json").read_text())
    record["source_fingerprint"] = open_checkpoint(quantized).fingerprint
    (model / "shortstack.json").write_text(json.dumps(record))
    with pytest.raises(ShortstackError, match="is quantized; the teacher must"):
        retrained("local", tmp_path / "out", model=model, of=str(quantized))


def test_the_dense_model_is_the_one_that_the_record_names(retrained: Retrained, tmp_path: Path) -> None:
    retrained("local", tmp_path / "named", of=None)
    retrained("local", tmp_path / "given")
    assert hashes(tmp_path / "named")["model.safetensors"] == hashes(tmp_path / "given")["model.safetensors"]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"max_steps": 3}, "--max-steps 3|max_steps=3"),
        ({"eval_every": 3}, "eval.every"),
        ({"save_dtype": "float16"}, "save.dtype"),
        ({"workers": 2}, "workers"),
        ({"report_to": "wandb"}, "report.to"),
        ({"dense": "x"}, "dense"),
        ({"gradient_checkpointing": True}, "gradient.checkpointing"),
        ({"radius": 0}, "radius"),
        ({"lora_rank": 0}, "lora.rank"),
        ({"update_weight": -1.0}, "update.weight"),
        ({"cosine_weight": float("inf")}, "cosine.weight"),
        ({"epochs": 0}, "epochs"),
        ({"seq_len": 1}, "seq.len"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
    ],
    ids=str,
)
def test_a_request_that_makes_no_sense(
    changed: dict[str, Any], says: str, retrained: Retrained, tmp_path: Path
) -> None:
    with pytest.raises(ShortstackError, match=says) as error:
        retrained("local", tmp_path / "out", **changed)
    assert len(error.value.message.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_an_input_is_refused(retrained: Retrained, pruned: Path, dense: Path) -> None:
    for path in (pruned, dense, dense / "inside"):
        with pytest.raises(ShortstackError, match=r"input|exists|inside"):
            retrained("local", path, force=True)


@pytest.mark.fault(12)
def test_links_out_of_either_checkpoint_are_followed_when_allowed(
    retrained: Retrained, pruned: Path, dense: Path, tmp_path: Path
) -> None:
    farms = {name: tmp_path / name for name in ("pruned", "dense")}
    for source, farm in ((pruned, farms["pruned"]), (dense, farms["dense"])):
        farm.mkdir()
        for file in source.iterdir():
            (farm / file.name).symlink_to(file)
    for model, of in ((farms["pruned"], dense), (pruned, farms["dense"])):
        with pytest.raises(ShortstackError, match="is a link to .* outside the checkpoint"):
            retrained("local", tmp_path / "out", model=model, of=str(of))
    retrained("local", tmp_path / "out", model=farms["pruned"], of=str(farms["dense"]), allow_links=True)
