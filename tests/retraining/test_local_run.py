"""Block by block: what is trained and what stays, the dense model's states as whole models have them, and the memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shortstack.engine.block_model import Skeleton
from shortstack.families.open_model import open_checkpoint
from shortstack.pruning.prune import prune
from shortstack.retraining.local_healing import Healing
from shortstack.retraining.results import RetrainEstimate
from tests import pico
from tests.live_memory import peak_after
from tests.retraining.conftest import LONG
from tests.retraining.whole_states import MORE, distances, held_out_text, metrics, validation

Retrained = Callable[..., Any]
Built = Callable[..., Path]


@pytest.fixture(scope="module")
def healed(retrained: Retrained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both cuts of a model that lacks blocks 2, 3: 32 steps a block."""
    out = tmp_path_factory.mktemp("healed") / "out"
    retrained("local", out, radius="all", **MORE)
    return out


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"radius": "all"},
        {"lora_rank": 4, "radius": "all"},
        {"data": "rows", "seq_len": 400, "tokens": "600", "epochs": 4},
    ],
    ids=str,
)
def test_what_is_logged_is_what_whole_models_give(
    changed: dict[str, Any], retrained: Retrained, dense: Path, pruned: Path, text: Path, rows: Path, tmp_path: Path
) -> None:
    """Dense states, states of blocks that were healed before, padding, and what was written: all by another way."""
    out = tmp_path / "out"
    data = rows if changed.get("data") == "rows" else text
    given = {**MORE, **changed, "data": str(data)}
    retrained("local", out, **given)
    lines = {line["block"]: line for line in metrics(out) if "validation" in line}
    assert sorted(lines) == ([1, 4, 5] if changed.get("radius") == "all" else [1, 4])
    few = max(1, {"600": 6, "2K": 32}[given["tokens"]] // 10)
    batches = validation(data, pruned, given.get("seq_len", 32), few)
    after = distances(out, dense, batches, [1, 4, 5, 6])
    before = distances(pruned, dense, batches, [1, 4, 5, 6])
    for position, block in ((1, 1), (2, 4), (3, 5)):
        if block in lines:
            assert lines[block]["validation"] == pytest.approx(after[position], rel=1e-3), block
            assert lines[block]["validation"] < lines[block]["validation_before"]
            assert after[position] < before[position]
    assert lines[1]["validation_before"] == pytest.approx(before[1], rel=1e-3)  # nothing before it was healed


def test_untouched_tensors_keep_their_bytes_and_trained_ones_their_types(
    built: Built, retrained: Retrained, tmp_path: Path
) -> None:
    dense = built("qwen2", dtype=torch.bfloat16, shard_bytes=40_000, **LONG)
    model, out = tmp_path / "model", tmp_path / "out"
    prune(str(dense), blocks="2", out=model, quiet=True)
    retrained("local", out, model=model, of=str(dense))
    before, after = open_checkpoint(model), open_checkpoint(out)
    assert [path.name for path in before.shards] == [path.name for path in after.shards]
    assert before.tensors.keys() == after.tensors.keys()
    changed = set()
    for name, tensor in before.tensors.items():
        ours = after.tensors[name]
        assert (ours.dtype, ours.shape, ours.file.name) == (tensor.dtype, tensor.shape, tensor.file.name)
        raw = [one.file.read_bytes()[one.start : one.start + one.nbytes] for one in (tensor, ours)]
        if raw[0] != raw[1]:
            changed.add(before.anatomy.block_of(name))
    assert changed == {1, 2}  # the blocks on both sides of the cut
    for name in ("config.json", "tokenizer.json"):
        assert (model / name).read_bytes() == (out / name).read_bytes()
    assert {"metrics.jsonl", "retraining.json", "README.md", "shortstack.json"} <= {p.name for p in out.iterdir()}


def test_the_history_names_the_blocks_and_the_card_the_way(healed: Path, dense: Path) -> None:
    step = json.loads((healed / "shortstack.json").read_text())["steps"][-1]
    assert step["method"] == "local"
    assert step["trained_blocks"] == [1, 4, 5]  # block 0 gives what it gave in the dense model
    assert step["hyperparameters"]["local"]["dense"] == open_checkpoint(dense).fingerprint
    assert "retrained (local) for" in (healed / "README.md").read_text()
    rows = json.loads((healed / "retraining.json").read_text())["models"]
    assert list(rows) == ["before", "after", "dense"]


def test_the_table_is_what_whole_models_are_measured_as(
    healed: Path, retrained: Retrained, dense: Path, pruned: Path, text: Path, tmp_path: Path
) -> None:
    """No model is held whole for the table either; the figures are those of the other ways."""
    rows = retrained("cpt", tmp_path / "cpt", max_steps=1, dense=str(dense), isolate_documents=False).rows
    found = json.loads((healed / "retraining.json").read_text())["models"]
    for which in ("before", "dense"):
        assert found[which]["figures"]["validation"] == pytest.approx(rows[which]["figures"]["validation"], rel=1e-5)
        assert found[which]["parameters"] == rows[which]["parameters"]
    followed = retrained("local", tmp_path / "out", eval_data=str(text), eval_windows=3).rows
    expected = retrained("cpt", tmp_path / "again", max_steps=1, eval_data=str(text), eval_windows=3).rows
    name = f"ppl:{text.name}"
    assert followed["before"]["figures"][name] == pytest.approx(expected["before"]["figures"][name], rel=1e-5)


def test_an_adapter_changes_matrices_by_its_rank(retrained: Retrained, pruned: Path, tmp_path: Path) -> None:
    retrained("local", tmp_path / "out", lora_rank=3, **MORE)
    before, after = (load_file(folder / "model.safetensors") for folder in (pruned, tmp_path / "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[2] for name in changed} == {"1", "2"}
    for name in changed:
        assert "norm" not in name
        assert torch.linalg.matrix_rank((after[name] - before[name]).double(), rtol=1e-4) == 3, name


def test_experts_that_are_stored_one_by_one_are_trained(built: Built, retrained: Retrained, tmp_path: Path) -> None:
    dense, model, out = built("mixtral", **LONG), tmp_path / "model", tmp_path / "out"
    prune(str(dense), blocks="3", out=model, quiet=True)
    retrained("local", out, model=model, of=str(dense), **MORE)
    before, after = (load_file(folder / "model.safetensors") for folder in (model, out))
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    assert any("experts" in name and not torch.equal(before[name], after[name]) for name in before)
    logged = [line["validation"] for line in metrics(out) if "validation" in line]
    assert logged[-1] == pytest.approx(
        distances(out, dense, held_out_text(model, tmp_path), [1, 2, 4, 5, 6])[3], rel=1e-3
    )


def test_memory_is_that_of_a_few_blocks_whatever_the_depth(retrained: Retrained, text: Path, tmp_path: Path) -> None:
    """Non-block weights, three blocks, one block's gradients and optimizer: counted at every step, on disk states."""
    peaks: dict[int, int] = {}
    wide = {"hidden_size": 128, "intermediate_size": 512, "head_dim": 32, **LONG}
    for depth in (6, 14):
        dense, model = tmp_path / f"dense-{depth}", tmp_path / f"model-{depth}"
        pico.build(dense, num_hidden_layers=depth, **wide)
        prune(str(dense), blocks="2,3", out=model, quiet=True)
        with peak_after(
            (Healing, "gradients"), (Healing, "_losses"), (Healing, "_save"), (Skeleton, "run_block")
        ) as peak:
            retrained(
                "local", tmp_path / f"out-{depth}", model=model, of=str(dense), states="disk", tokens="128",
                validation=1, save_every=100,
            )  # fmt: skip
        peaks[depth] = peak[0]
    checkpoint = open_checkpoint(tmp_path / "dense-14")
    block = 4 * max(checkpoint.block_parameters())
    outside = 4 * checkpoint.parameters(checkpoint.outside_blocks)
    batch = 2 * 32 * 4 * (8 * 128 + 4 * 512)  # activations of a micro-batch, as autograd keeps them, generously
    assert peaks[14] <= peaks[6] + block // 2
    assert peaks[14] <= outside + 3 * block + 3 * block + batch
    assert peaks[14] < 4 * checkpoint.parameters()


def test_a_dry_run_trains_nothing(retrained: Retrained, tmp_path: Path) -> None:
    found = retrained("local", tmp_path / "out", dry_run=True, **MORE)
    assert isinstance(found, RetrainEstimate)
    assert list(tmp_path.iterdir()) == []
    result = retrained("local", tmp_path / "out", **MORE)
    assert (found.steps, found.tokens) == (result.steps, result.tokens) == (64, 2048)
    assert found.bytes_per_device["optimizer"] == 2 * found.bytes_per_device["gradients"]
    assert found.trained == 2 * found.bytes_per_device["gradients"] // 4
    assert found.seconds_per_step > 0
    shown = found.to_text()
    for says in ("nothing was trained", "hidden states take", "2 of 4 blocks, 32 steps each", "disk: about "):
        assert says in shown
    on_disk = retrained("local", tmp_path / "disk", dry_run=True, states="disk", **MORE)
    assert "hidden states" in found.bytes_per_device
    assert "hidden states" not in on_disk.bytes_per_device


def test_an_adapter_has_fewer_parameters(retrained: Retrained, tmp_path: Path) -> None:
    whole = retrained("local", tmp_path / "out", dry_run=True)
    few = retrained("local", tmp_path / "out", dry_run=True, lora_rank=2)
    assert few.trained < whole.trained // 4
