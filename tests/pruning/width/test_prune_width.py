"""Width pruning: a narrower checkpoint computes what the dense model computes with the same heads and channels masked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shortstack.common.formatting import count
from shortstack.errors import ShortstackError
from shortstack.families.open_model import open_checkpoint
from shortstack.families.table import FAMILIES
from shortstack.recipes.run import run as run_recipe
from tests import pico
from tests.families import tiny
from tests.pruning.width.material import logits, masked, narrow, numbers, step_of
from tests.retraining.processes import launched

Built = Callable[..., Path]
WIDE = sorted(name for name, family in FAMILIES.items() if family.widths is not None)


@pytest.mark.parametrize("family", WIDE)
@pytest.mark.parametrize("head_unit", ["kv-groups", "query-heads"])
def test_equals_the_masked_model(
    family: str, head_unit: str, tiny_model: Callable[[str], Path], rows: Path, tmp_path: Path
) -> None:
    """In float32, loaded as a user does, without a missing or unexpected key; it generates with and without a cache."""
    source = tiny_model(family)
    result = narrow(source, tmp_path / "w", rows, ratio=0.3, head_unit=head_unit, verify=True)
    heads = {"kv-groups": (2, 1), "query-heads": (2, 2)}[head_unit]
    assert (result.after["heads"], result.after["kv_heads"]) == heads
    assert result.after["channels"] < 96
    loaded, info = tiny.load(tmp_path / "w")
    dense, known = tiny.load(source)
    assert {name: set(keys) for name, keys in info.items()} == {name: set(keys) for name, keys in known.items()}
    expected, computed = logits(masked(dense, source, step_of(tmp_path / "w"))), logits(loaded)
    assert not torch.allclose(logits(tiny.load(source)[0]), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(computed, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert tiny.greedy(loaded, True) == tiny.greedy(loaded, False)


@pytest.mark.parametrize("options", [{"attention_bias": True, "mlp_bias": True}, {"shard_bytes": 30_000}])
def test_biases_and_shards(built: Built, rows: Path, options: dict[str, Any], tmp_path: Path) -> None:
    source = built("llama", **options)
    narrow(source, tmp_path / "w", rows, ratio=0.2, verify=True)
    index = tmp_path / "w/model.safetensors.index.json"
    assert index.exists() == ("shard_bytes" in options)
    narrower = pico.load(tmp_path / "w")
    dense = masked(pico.load(source), source, step_of(tmp_path / "w"))
    torch.testing.assert_close(logits(narrower), logits(dense), rtol=1e-4, atol=1e-4)


def naive_importance(source: Path, rows: Path) -> list[dict[str, torch.Tensor]]:
    """Per block: sum of |weight x gradient| over each head's and each channel's weights, from one backward pass of the whole
    model over all windows together."""
    model = pico.load(source)
    ids = torch.tensor([json.loads(line)["input_ids"] for line in rows.read_text().splitlines()])
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    found = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        scores = {
            name: (module.weight * module.weight.grad).abs()
            for name, module in [*attention.named_children(), *mlp.named_children()]
            if hasattr(module, "weight")
        }
        size = attention.head_dim
        queries = scores["q_proj"].sum(1) + scores["o_proj"].sum(0)
        keys = scores["k_proj"].sum(1) + scores["v_proj"].sum(1)
        groups = queries.reshape(len(keys) // size, -1).sum(1) + keys.reshape(-1, size).sum(1)
        channels = scores["gate_proj"].sum(1) + scores["up_proj"].sum(1) + scores["down_proj"].sum(0)
        found.append({"kv_heads": groups, "channels": channels, "heads": queries.reshape(-1, size).sum(1)})
    return found


@pytest.mark.parametrize("memory", ["streamed", "resident"])
def test_the_least_important_units_go(built: Built, rows: Path, memory: str, tmp_path: Path) -> None:
    """Element-wise first-order Taylor as published, by a naive backward pass; streamed and whole."""
    source = built("llama")
    result = narrow(source, tmp_path / "w", rows, ratio=0.3, memory=memory)
    kept_channels = result.after["channels"]
    for block, importance in enumerate(naive_importance(source, rows)):
        gone = step_of(tmp_path / "w")["removed"][str(block)]
        assert numbers(gone["kv_heads"]) == [int(importance["kv_heads"].argmin())]
        order = importance["channels"].argsort().tolist()
        assert numbers(gone["channels"]) == sorted(order[: 48 - (kept_channels or 0)])


def test_query_heads_go_from_every_group(built: Built, rows: Path, tmp_path: Path) -> None:
    source = built("llama")
    narrow(source, tmp_path / "w", rows, params="57.5K", only="heads", head_unit="query-heads")
    for block, importance in enumerate(naive_importance(source, rows)):
        gone = step_of(tmp_path / "w")["removed"][str(block)]
        least = importance["heads"].reshape(2, 2).argmin(1)
        assert numbers(gone["heads"]) == [int(least[0]), 2 + int(least[1])]
        assert gone["kv_heads"] == gone["channels"] == ""


def test_ratio_is_the_share_of_the_whole_model(built: Built, rows: Path, tmp_path: Path) -> None:
    """The same meaning as in `prune --ratio`; the share of the blocks is reported beside it."""
    source = built("llama")
    result = narrow(source, tmp_path / "w", rows, ratio=0.25)
    sizes = [sum(p.numel() for p in pico.load(directory).parameters()) for directory in (source, tmp_path / "w")]
    assert [result.before["parameters"], result.after["parameters"]] == sizes
    one_channel = 3 * 32 * 6 / sizes[0]
    assert result.removal_ratio == pytest.approx(1 - sizes[1] / sizes[0])
    assert 0.25 - one_channel < result.removal_ratio <= 0.25
    assert result.block_removal_ratio > result.removal_ratio
    shown = result.to_text()
    assert f"{result.removal_ratio:.1%} of the parameters of {source} removed" in shown
    assert f"({result.block_removal_ratio:.1%} of those of its blocks)" in shown
    assert result.before["kv_bytes_per_token"] == 2 * (result.after["kv_bytes_per_token"] or 0)


def test_a_plain_checkpoint_with_its_record(built: Built, rows: Path, tmp_path: Path) -> None:
    """Companions are copied, every file's hash stands in the record, the input is as it was, nothing is left beside."""
    source = built("llama", tie_word_embeddings=True)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    result = narrow(source, tmp_path / "w", rows, params="44K", only="mlp", multiple_of=16)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["w"]
    record = json.loads((tmp_path / "w/shortstack.json").read_text())
    assert set(record["files"]) == {path.name for path in (tmp_path / "w").iterdir()} - {"shortstack.json"}
    for name, digest in record["files"].items():
        assert digest == hashlib.sha256((tmp_path / "w" / name).read_bytes()).hexdigest()
    assert "tokenizer.json" in result.files
    assert (record["steps"][0]["stage"], record["kept_blocks"]) == ("prune-width", list(range(6)))
    config = json.loads((tmp_path / "w/config.json").read_text())
    assert config["intermediate_size"] == result.after["channels"] == 16 * ((result.after["channels"] or 0) // 16) < 48
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (4, 2)
    card = (tmp_path / "w/README.md").read_text()
    assert f"4 heads and {result.after['channels']} channels" in card
    assert "was not trained after the removal" in card


def test_the_head_dim_that_followed_from_the_number_of_heads_is_written(
    copied: Built, rows: Path, tmp_path: Path
) -> None:
    source = copied("llama")
    config = json.loads((source / "config.json").read_text())
    del config["head_dim"]
    (source / "config.json").write_text(json.dumps(config))
    narrow(source, tmp_path / "w", rows, ratio=0.15, only="heads", verify=True)
    assert json.loads((tmp_path / "w/config.json").read_text())["head_dim"] == 8


def test_files_that_state_the_widths_are_left_out(
    copied: Built, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = copied("mistral")
    (source / "params.json").write_text('{"dim": 32, "n_layers": 6, "n_heads": 4, "hidden_dim": 48}')
    (source / "notes.json").write_text('{"author": "a"}')
    narrow(source, tmp_path / "w", rows, ratio=0.2, quiet=False)
    assert "params.json (states the number of heads or channels)" in capsys.readouterr().err
    assert not (tmp_path / "w/params.json").exists()
    assert (tmp_path / "w/notes.json").exists()


def test_a_pruned_checkpoint_gets_narrower_and_a_narrower_one_pruned(built: Built, rows: Path, tmp_path: Path) -> None:
    """Blocks keep the numbers of the original model."""
    from shortstack.pruning.prune import prune

    prune(str(built("llama")), out=tmp_path / "p", blocks="1", quiet=True)
    narrow(tmp_path / "p", tmp_path / "pw", rows, ratio=0.2, verify=True)
    assert list(step_of(tmp_path / "pw")["removed"]) == ["0", "2", "3", "4", "5"]
    prune(str(tmp_path / "pw"), out=tmp_path / "pwp", blocks="4", verify=True, quiet=True)
    assert open_checkpoint(tmp_path / "pwp").original_blocks == (0, 2, 3, 5)
    narrow(tmp_path / "pwp", tmp_path / "last", rows, ratio=0.1, only="mlp", verify=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kept_weights_keep_their_bytes(built: Built, rows: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    source = built("qwen2", dtype=dtype)
    narrow(source, tmp_path / "w", rows, ratio=0.2, dtype="auto")
    gone = step_of(tmp_path / "w")["removed"]["2"]
    before, after = (load_file(directory / "model.safetensors") for directory in (source, tmp_path / "w"))
    kept = [channel for channel in range(48) if channel not in numbers(gone["channels"])]
    name = "model.layers.2.mlp.down_proj.weight"
    assert after[name].dtype == dtype
    assert torch.equal(after[name], before[name][:, kept])
    name = "model.layers.2.self_attn.k_proj.bias"
    assert torch.equal(after[name], before[name][8:] if gone["kv_heads"] == "0" else before[name][:8])


def test_verification_sees_a_difference(
    built: Built, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the columns of another head in o_proj: no output is written."""
    from shortstack.pruning.width import prune_width as stage
    from shortstack.pruning.width import units

    real = units.narrow_cut
    wrong: list[bool] = []

    def swapped(checkpoint: Any, shape: Any, width: Any, kept: Any) -> Any:
        cut = real(checkpoint, shape, width, kept)
        wrong.append(True)
        first = cut.tensors
        for copy in first:
            if copy.name.endswith("0.self_attn.o_proj.weight"):
                object.__setattr__(
                    copy, "sliced", (1, ((0, 16),) if copy.sliced == (1, ((16, 32),)) else (1, ((16, 32),)))
                )
        return cut

    monkeypatch.setattr(stage, "narrow_cut", swapped)
    with pytest.raises(ShortstackError, match="logits differ|verification failed"):
        narrow(built("llama"), tmp_path / "w", rows, ratio=0.3, verify=True)
    assert wrong
    assert list(tmp_path.iterdir()) == [] or not (tmp_path / "w").exists()


def test_a_run_that_failed_late_resumes(
    built: Built, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gradients are not computed again, and another ratio takes the same ones; the result is that of one run."""
    from shortstack.pruning.width import prune_width as stage

    def full(*_: object) -> None:
        raise ShortstackError("the disk is full")

    source = built("llama")
    with monkeypatch.context() as patch:
        patch.setattr(stage, "copy_weights", full)
        with pytest.raises(ShortstackError, match="full"):
            narrow(source, tmp_path / "w", rows, ratio=0.2, save_every=0.0)
    assert not (tmp_path / "w").exists()
    narrow(source, tmp_path / "w", rows, ratio=0.3, quiet=False)
    assert "saved state" in capsys.readouterr().err
    narrow(source, tmp_path / "once", rows, ratio=0.3)
    assert step_of(tmp_path / "w")["removed"] == step_of(tmp_path / "once")["removed"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["once", "w"]


@pytest.mark.slow
def test_two_processes_choose_as_one(built: Built, rows: Path, tmp_path: Path) -> None:
    """They share the windows, and the first one writes."""
    arguments = [
        "prune-width", str(built("llama")), "--ratio", "0.3", "--data", str(rows), "--samples", "4", "--out",
        str(tmp_path / "two"),
    ]  # fmt: skip
    process = launched("ddp", 2, arguments, tmp_path)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    narrow(built("llama"), tmp_path / "one", rows, ratio=0.3)
    assert step_of(tmp_path / "two")["removed"] == step_of(tmp_path / "one")["removed"]
    assert not list(tmp_path.glob(".*work*"))


def test_a_step_of_a_recipe(built: Built, rows: Path, tmp_path: Path) -> None:
    """A dry run tells the parameters that the step leaves, and those of a step after it; the run makes them."""
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"model: {built('llama')}\n"
        "steps:\n"
        f"  narrow: {{stage: prune-width, ratio: 0.2, data: {rows}, samples: 4, seq_len: 16, dtype: float32}}\n"
        "  prune: {blocks: '1'}\n"
        f"  again: {{stage: prune-width, ratio: 0.1, data: {rows}, samples: 4, seq_len: 16, dtype: float32}}\n"
    )
    rehearsal = run_recipe(str(path), out=tmp_path / "dry", dry_run=True, quiet=True).to_text()
    run_recipe(str(path), out=tmp_path / "run", quiet=True)
    for step, blocks in (("narrow", "heads"), ("prune", "5 blocks")):
        sizes = open_checkpoint(tmp_path / "run" / step).parameters()
        line = next(line for line in rehearsal.splitlines() if line.startswith(f"{step} "))
        assert blocks in line
        assert f"{count(sizes)} parameters" in line
    assert open_checkpoint(tmp_path / "run/again").original_blocks == (0, 2, 3, 4, 5)


def test_a_dry_run_finds_a_ratio_that_leaves_no_head(built: Built, rows: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"model: {built('llama')}\nsteps:\n  narrow: {{stage: prune-width, ratio: 0.9, seq_len: 16, data: {rows}}}\n"
    )
    rehearsal = run_recipe(str(path), out=tmp_path / "run", dry_run=True, quiet=True)
    assert "would fail: narrow: " in rehearsal.to_text()
    assert "would leave no head or no channel" in rehearsal.to_text()
    assert rehearsal.exit_code == 1
