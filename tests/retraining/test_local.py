"""Block by block: what is trained and what stays, the dense model's states as whole models have them, and what is refused."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shortstack.common.progress import Progress
from shortstack.data.loaders import open_dataset
from shortstack.data.tokenizer import load_tokenizer
from shortstack.engine.block_model import NotSeparableError, Skeleton
from shortstack.errors import ShortstackError
from shortstack.families.open_model import open_checkpoint
from shortstack.pruning.prune import prune
from shortstack.retraining.batch_states import BatchStates
from shortstack.retraining.local_healing import Healing
from shortstack.retraining.losses import relative_distance
from shortstack.retraining.results import RetrainEstimate
from shortstack.retraining.run_folder import Session
from tests import pico
from tests.kills import hashes
from tests.retraining.conftest import LONG
from tests.retraining.test_resume import CutOffError, cut_off_at, work_of

Retrained = Callable[..., Any]
Built = Callable[..., Path]
MORE = {"tokens": "2K", "epochs": 2}


@pytest.fixture(scope="module")
def healed(retrained: Retrained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both cuts of a model that lacks blocks 2, 3: 32 steps a block."""
    out = tmp_path_factory.mktemp("healed") / "out"
    retrained("local", out, radius="all", **MORE)
    return out


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def block_lists(model: Any, depth: int) -> Any:
    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == depth)


@contextmanager
def outputs(model: Any, depth: int) -> Iterator[list[torch.Tensor]]:
    """Within, what each block gives, in their order."""
    found: list[torch.Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(keep) for block in block_lists(model, depth)]
    yield found
    for handle in handles:
        handle.remove()


def distances(pruned: Path, dense: Path, batches: list[dict[str, Any]], goals: list[int]) -> list[float]:
    """For each block of the pruned model how far its states are from the dense model's, both run whole, by transformers."""
    ours, theirs = pico.load(pruned), pico.load(dense)
    sums, tokens = [0.0] * len(goals), 0
    for batch in batches:
        given = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        if "attention_mask" in given:
            given["position_ids"] = batch["position_ids"]
        real_BT = given.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        with torch.no_grad(), outputs(ours, len(goals)) as mine, outputs(theirs, max(goals)) as dense_states:
            ours(**given, use_cache=False)
            theirs(**given, use_cache=False)
        for position, goal in enumerate(goals):
            sums[position] += float(relative_distance(mine[position][real_BT], dense_states[goal - 1][real_BT]).sum())
        tokens += int(real_BT.sum())
    return [one / tokens for one in sums]


def validation(data: Path, model: Path, seq_len: int, count: int) -> list[dict[str, Any]]:
    checkpoint = open_checkpoint(model)
    dataset = open_dataset(
        str(data), load_tokenizer(checkpoint), seq_len=seq_len, isolated=data.suffix == ".json",
        progress=Progress(quiet=True), embedding_rows=checkpoint.embedding_rows,
    )  # fmt: skip
    return dataset.validation[:count]


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


def held_out_text(model: Path, folder: Path) -> list[dict[str, Any]]:
    from tests.retraining import material

    return validation(material.texts(folder / "again.jsonl"), model, 32, 3)


def test_on_disk_as_in_memory(retrained: Retrained, tmp_path: Path) -> None:
    for states in ("memory", "disk"):
        retrained("local", tmp_path / states, states=states, update_weight=0.5, cosine_weight=0.1, epochs=2)
    assert hashes(tmp_path / "memory")["model.safetensors"] == hashes(tmp_path / "disk")["model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")) == ["disk", "memory"]


def test_states_that_would_fill_the_memory_lie_on_disk(
    retrained: Retrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files: list[Path | None] = []
    real = BatchStates.__init__

    def made(self: BatchStates, shapes: Any, width: int, dtype: torch.dtype, file: Path | None) -> None:
        files.append(file)
        real(self, shapes, width, dtype, file)

    monkeypatch.setattr(BatchStates, "__init__", made)
    monkeypatch.setattr("shortstack.retraining.local_streams.available_bytes", lambda *_: 200_000)
    retrained("local", tmp_path / "out", quiet=False)
    assert "they lie on disk, beside" in capsys.readouterr().err
    assert None not in files
    monkeypatch.setattr("shortstack.retraining.local_streams.available_bytes", lambda *_: 1_000)
    with pytest.raises(ShortstackError, match="are free in memory") as error:
        retrained("local", tmp_path / "again", states="memory")
    assert "--states disk" in error.value.hint


# ---- memory


def live_bytes() -> int:
    """Bytes of all storages of tensors that are alive."""
    storages = {}
    for found in gc.get_objects():
        if isinstance(found, torch.Tensor) and not found.is_meta:
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_memory_is_that_of_a_few_blocks_whatever_the_depth(
    retrained: Retrained, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Non-block weights, three blocks, one block's gradients and optimizer: counted at every step, on disk states."""
    peaks: dict[int, int] = {}
    wide = {"hidden_size": 128, "intermediate_size": 512, "head_dim": 32, **LONG}
    for depth in (6, 14):
        dense, model = tmp_path / f"dense-{depth}", tmp_path / f"model-{depth}"
        pico.build(dense, num_hidden_layers=depth, **wide)
        prune(str(dense), blocks="2,3", out=model, quiet=True)
        gc.collect()
        before, peak = live_bytes(), [0]

        def counted(*given: Any, real: Any, peak: list[int] = peak, before: int = before) -> Any:
            result = real(*given)
            peak[0] = max(peak[0], live_bytes() - before)
            return result

        with monkeypatch.context() as patch:
            for owner, name in (
                (Healing, "gradients"),
                (Healing, "_losses"),
                (Healing, "_save"),
                (Skeleton, "run_block"),
            ):
                real = getattr(owner, name)
                patch.setattr(owner, name, lambda *given, real=real, counted=counted: counted(*given, real=real))
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


# ---- what is refused, or goes wrong


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


def test_text_that_is_shorter_than_requested_is_refused(retrained: Retrained, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(ShortstackError, match=r"--tokens 1000000: .*text\.jsonl holds \d+ tokens to train on") as error:
        retrained("local", tmp_path / "out", tokens="1M")
    assert "--epochs N" in error.value.hint
    with pytest.raises(ShortstackError, match=r"rows\.json holds \d+ tokens"):
        retrained("local", tmp_path / "out", data=str(rows), seq_len=400, tokens="1M")
    found = retrained("local", tmp_path / "out", tokens=None, dry_run=True)  # without it, all of a short text
    assert 15_000 < found.tokens < 25_000


def test_dense_states_that_are_not_finite_are_an_error(built: Built, retrained: Retrained, tmp_path: Path) -> None:
    dense, model = tmp_path / "dense", tmp_path / "model"
    shutil.copytree(built("llama", **LONG), dense)
    weights = load_file(dense / "model.safetensors")
    weights["model.layers.4.mlp.down_proj.weight"] *= 1e38
    save_file(weights, dense / "model.safetensors", {"format": "pt"})
    prune(str(dense), blocks="2,3", out=model, quiet=True)
    with pytest.raises(ShortstackError, match="block 4 gives hidden states that are not finite"):
        retrained("local", tmp_path / "out", model=model, of=str(dense))
    assert not (tmp_path / "out").exists()


@pytest.mark.fault(65)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(
    value: float, retrained: Retrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls, out = Healing._losses, [0], tmp_path / "out"

    def poisoned(self: Healing, number: int) -> dict[str, torch.Tensor]:
        calls[0] += torch.is_grad_enabled()
        found = real(self, number)
        return {**found, "loss": found["loss"] * value} if calls[0] == 2 * 6 and torch.is_grad_enabled() else found

    with monkeypatch.context() as patch:
        patch.setattr(Healing, "_losses", poisoned)
        with pytest.raises(ShortstackError, match=r"the loss of step 6 is (nan|inf).*checkpoint of step 4 is kept"):
            retrained("local", out)
    assert not out.exists()
    retrained("local", out)
    retrained("local", tmp_path / "whole")
    assert hashes(out)["model.safetensors"] == hashes(tmp_path / "whole")["model.safetensors"]


@pytest.mark.fault(49)
def test_a_disk_that_fills_while_states_lie_on_it(
    retrained: Retrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beforehand where it is known, else at the write; the blocks that are done stay."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("shortstack.retraining.local_streams._free_disk", lambda _: 1000)
        with pytest.raises(ShortstackError, match="hidden states take .* 1 kB are free on the disk"):
            retrained("local", out, states="disk")
    real = BatchStates.__setitem__

    def full(self: BatchStates, number: int, states_BTD: torch.Tensor) -> None:
        if any(work_of(out).glob("blocks/*")):
            raise self._unwritable(OSError(28, "No space left on device"))
        real(self, number, states_BTD)

    with monkeypatch.context() as patch:
        patch.setattr(BatchStates, "__setitem__", full)
        with pytest.raises(ShortstackError, match="hidden states could not be written"):
            retrained("local", out, states="disk")
    assert not out.exists()
    assert not (work_of(out) / "states").exists()
    retrained("local", out, states="disk", quiet=False)
    assert "resuming from step 4" in capsys.readouterr().err


@pytest.mark.fault(49, 93)
def test_a_full_disk_at_a_save_keeps_the_checkpoint_before(
    retrained: Retrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Session.complete

    def full(self: Session, checkpoint: Path) -> None:
        if checkpoint.name == "checkpoint-6":
            raise OSError(28, "No space left on device")
        real(self, checkpoint)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "complete", full)
        with pytest.raises(ShortstackError, match="could not be saved.*the one of step 4 is kept"):
            retrained("local", tmp_path / "out")
    assert sorted(path.name for path in (work_of(tmp_path / "out") / "checkpoints").iterdir()) == [
        "checkpoint-2", "checkpoint-4",
    ]  # fmt: skip


@pytest.fixture
def cut_off(retrained: Retrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that ended in the middle of its second block."""
    with monkeypatch.context() as patch:
        cut_off_at(patch, 6)
        with pytest.raises(CutOffError):
            retrained("local", tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.fault(68)
def test_a_state_without_its_optimizer_is_refused(cut_off: Path, retrained: Retrained) -> None:
    (work_of(cut_off) / "checkpoints/checkpoint-6/optimizer.safetensors").unlink()
    with pytest.raises(ShortstackError, match=r"optimizer\.safetensors") as error:
        retrained("local", cut_off)
    assert "--weights-only-resume" in error.value.hint
    retrained("local", cut_off, weights_only_resume=True)
    assert (cut_off / "model.safetensors").is_file()


@pytest.mark.fault(68)
def test_a_finished_block_that_is_lost_is_an_error(cut_off: Path, retrained: Retrained) -> None:
    (file,) = (work_of(cut_off) / "blocks").iterdir()
    whole = file.read_bytes()
    for broken in (whole[: len(whole) // 2], None):
        file.unlink(missing_ok=True)
        if broken is not None:
            file.write_bytes(broken)
        with pytest.raises(ShortstackError, match="a block that was trained before cannot be read") as error:
            retrained("local", cut_off)
        assert "--restart" in error.value.hint
    retrained("local", cut_off, restart=True)


@pytest.mark.fault(69)
def test_another_run_is_refused_with_what_differs(cut_off: Path, retrained: Retrained) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"radius": 2}, "hyperparameters.local.radius was 1, now 2"),
        ({"lora_rank": 2}, "hyperparameters.local.lora_rank"),
        ({"tokens": "1K"}, "steps was 8, now 16"),
        ({"seed": 1}, "seed was 42, now 1"),
    ]
    for changed, difference in cases:
        with pytest.raises(ShortstackError, match=difference):
            retrained("local", cut_off, **changed)
    # Resumed all the same: what was saved is of another block.
    with pytest.raises(ShortstackError, match="is of step 2 of block 4, and the run is at step 6 of block 1") as error:
        retrained("local", cut_off, tokens="1K", force=True)
    assert "--restart" in error.value.hint


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


def test_a_model_whose_blocks_do_not_come_apart_is_refused(
    retrained: Retrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def apart(*_: Any, **__: Any) -> None:
        raise NotSeparableError("model", "its blocks are given what depends on the text")

    monkeypatch.setattr(Skeleton, "__init__", apart)
    with pytest.raises(
        ShortstackError, match="its blocks cannot be trained one at a time: its blocks are given"
    ) as error:
        retrained("local", tmp_path / "out")
    assert "retrain distill --hidden-weight 1" in error.value.hint


def test_a_block_that_training_makes_worse_is_left_as_it_was(
    retrained: Retrained, pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    retrained("local", tmp_path / "out", lr=0.9, quiet=False)
    assert "training did not bring it nearer to the dense model" in capsys.readouterr().err
    left = {
        line["block"]
        for line in metrics(tmp_path / "out")
        if line.get("validation", 0) > line.get("validation_before", 0)
    }
    assert left
    before, after = (load_file(folder / "model.safetensors") for folder in (pruned, tmp_path / "out"))
    changed = {(1, 4)[int(name.split(".")[2]) - 1] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {1, 4} - left


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


def test_an_output_that_is_an_input_is_refused(retrained: Retrained, pruned: Path, dense: Path) -> None:
    for path in (pruned, dense, dense / "inside"):
        with pytest.raises(ShortstackError, match=r"input|exists|inside"):
            retrained("local", path, force=True)


def test_an_adapter_has_fewer_parameters(retrained: Retrained, tmp_path: Path) -> None:
    whole = retrained("local", tmp_path / "out", dry_run=True)
    few = retrained("local", tmp_path / "out", dry_run=True, lora_rank=2)
    assert few.trained < whole.trained // 4


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
