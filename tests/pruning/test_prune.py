"""Promise 1: the pruned checkpoint computes what the original computes with those blocks skipped, bit for bit."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from shortstack.checkpoint import drop_blocks
from shortstack.errors import ShortstackError, UsageError
from shortstack.families.open_model import open_checkpoint
from shortstack.pruning.plan import plan as write_plan
from shortstack.pruning.plan import plan_for
from shortstack.pruning.prune import prune
from tests import oracle, pico
from tests.kills import recorded_hashes

Built = Callable[..., Path]


def logits(model: Any, windows: list[list[int]]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor(windows), use_cache=False).logits


def tensors_of(directory: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                found[name] = file.get_tensor(name).contiguous().view(torch.uint8).numpy().tobytes()
    return found


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("blocks", ["0", "1,3", "5"])
def test_configs_that_hold_only_the_rule(copied: Built, family: str, blocks: str, tmp_path: Path) -> None:
    """Changing the count alone would be silently wrong: the window pattern would shift."""
    model = pico.without_lists(copied(family))
    result = prune(str(model), out=tmp_path / "p", blocks=blocks, verify=True, quiet=True)
    windows = pico.windows(2, 24)
    expected = logits(oracle.bypassed(pico.load(model), set(result.plan.removed)), windows)
    assert torch.equal(logits(pico.load(tmp_path / "p"), windows), expected)


@pytest.mark.parametrize("options", [{}, {"shard_bytes": 40_000}, {"tie_word_embeddings": True}])
def test_kept_tensors_are_the_same_bytes(built: Built, options: dict[str, Any], tmp_path: Path) -> None:
    model = built("llama", **options)
    prune(str(model), out=tmp_path / "p", blocks="1,4", quiet=True)
    before, after = tensors_of(model), tensors_of(tmp_path / "p")
    expected = {}
    for name, data in before.items():
        if not name.startswith("model.layers."):
            expected[name] = data
        elif (index := int(name.split(".")[2])) in (0, 2, 3, 5):
            expected[name.replace(f".{index}.", f".{[0, 2, 3, 5].index(index)}.", 1)] = data
    assert after == expected


@pytest.mark.parametrize("source", ["blocks", "scores", "file"])
def test_a_cut_is_worked_out_once(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    """Planning, writing and verifying share one shortened config and one list of tensors."""
    model = built("llama")
    write_plan(str(model), blocks="1,4", out=tmp_path / "plan.json")
    (tmp_path / "block_order.csv").write_text("1,4,0,2,3,5\n")
    options: dict[str, dict[str, Any]] = {
        "blocks": {"blocks": "1,4"},
        "scores": {"scores": tmp_path / "block_order.csv", "remove": 2},
        "file": {"plan": tmp_path / "plan.json"},
    }
    with counted_cuts() as worked_out:
        result = prune(str(model), out=tmp_path / "p", verify=True, quiet=True, **options[source])
    assert result.plan.removed == (1, 4)
    assert worked_out == ["shortened_config", "shortened_tensors"]


@contextlib.contextmanager
def counted_cuts() -> Iterator[list[str]]:
    """Within, a name for each time that a shortened config or list of tensors is worked out, by whichever caller."""
    calls: list[str] = []
    watched = {work.__code__: work.__name__ for work in (drop_blocks.shortened_config, drop_blocks.shortened_tensors)}

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code in watched:
            calls.append(watched[frame.f_code])

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield calls
    finally:
        sys.setprofile(before)


def test_shards_stay_as_the_input_has_them(built: Built, tmp_path: Path) -> None:
    model = built("llama", shard_bytes=40_000)
    shards = len(list(model.glob("model-*.safetensors")))
    prune(str(model), out=tmp_path / "p", blocks="1", quiet=True)
    index = json.loads((tmp_path / "p/model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "p").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files
    assert 1 < len(files) <= shards
    assert index["metadata"]["total_size"] == sum(map(len, tensors_of(tmp_path / "p").values()))


@pytest.mark.fault(47)
def test_removing_nothing_copies_to_the_byte(built: Built, tmp_path: Path) -> None:
    import dataclasses

    model = built("llama")
    nothing = dataclasses.replace(plan_for(open_checkpoint(model), blocks="1").plan, removed=())
    prune(str(model), out=tmp_path / "p", plan=nothing, quiet=True)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "p" / name).read_bytes() == (model / name).read_bytes()


def test_everything_else_is_copied(copied: Built, tmp_path: Path) -> None:
    model = copied("llama")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (model / "LICENSE").write_text("its licence")
    (model / "modeling_own.py").write_text("raise SystemExit('executed')")
    (model / "pytorch_model.bin").write_bytes(b"other weights")
    (model / "README.md").write_text("its card")
    prune(str(model), out=tmp_path / "p", blocks="1", quiet=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "LICENSE"):
        assert (tmp_path / "p" / name).read_bytes() == (model / name).read_bytes()
    assert not (tmp_path / "p/modeling_own.py").exists()
    assert not (tmp_path / "p/pytorch_model.bin").exists()
    assert "without 1 of its 6" in (tmp_path / "p/README.md").read_text()


def test_config_is_edited_raw(copied: Built, tmp_path: Path) -> None:
    model = copied("llama")
    config = json.loads((model / "config.json").read_text())
    config |= {"some_unknown_entry": {"kept": [1, 2]}, "a_limit": float("inf")}
    (model / "config.json").write_text(json.dumps(config))
    prune(str(model), out=tmp_path / "p", blocks="1,2", quiet=True)
    after = json.loads((tmp_path / "p/config.json").read_text())
    assert after == {**config, "num_hidden_layers": 4}
    assert list(after) == list(config)


@pytest.mark.fault(48)
def test_provenance_and_repeated_pruning(built: Built, tmp_path: Path) -> None:
    """Block numbers are those of the original model, through repeated pruning."""
    model = built("llama")
    prune(str(model), out=tmp_path / "once", blocks="1,4", quiet=True)
    prune(str(tmp_path / "once"), out=tmp_path / "twice", blocks="3", quiet=True)
    prune(str(model), out=tmp_path / "directly", blocks="1,3-4", quiet=True)
    record = json.loads((tmp_path / "twice/shortstack.json").read_text())
    assert record["kept_blocks"] == [0, 2, 5]
    assert record["original_depth"] == 6
    assert record["source"] == str(model)
    assert record["source_fingerprint"] == open_checkpoint(model).fingerprint
    assert [step["removed_blocks"] for step in record["steps"]] == [[1, 4], [3]]
    assert tensors_of(tmp_path / "twice") == tensors_of(tmp_path / "directly")
    with pytest.raises(ShortstackError, match=r"block 1 is removed already; it has blocks 0, 2-3, 5"):
        prune(str(tmp_path / "once"), out=tmp_path / "never", blocks="1", quiet=True)


@pytest.mark.fault(92)
def test_two_runs_give_the_same_bytes(built: Built, tmp_path: Path) -> None:
    for name in ("a", "b"):
        prune(str(built("llama")), out=tmp_path / name, blocks="2", quiet=True)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


@pytest.mark.fault(107)
@pytest.mark.parametrize("options", [{}, {"shard_bytes": 40_000}])
def test_files_are_hashed(built: Built, options: dict[str, Any], tmp_path: Path) -> None:
    result = prune(str(built("llama", **options)), out=tmp_path / "p", blocks="2", quiet=True)
    assert result.files == recorded_hashes(tmp_path / "p")


class TestOutput:
    """Promise 5: an output is absent or complete, and the input is never touched."""

    def test_existing_output(self, built: Built, tmp_path: Path) -> None:
        (tmp_path / "p").mkdir()
        (tmp_path / "p/mine.txt").write_text("mine")
        with pytest.raises(ShortstackError, match="exists already"):
            prune(str(built("llama")), out=tmp_path / "p", blocks="1", quiet=True)
        with pytest.raises(ShortstackError, match="not a checkpoint that shortstack made"):
            prune(str(built("llama")), out=tmp_path / "p", blocks="1", force=True, quiet=True)
        assert (tmp_path / "p/mine.txt").read_text() == "mine"

    def test_force_replaces_what_shortstack_made(self, built: Built, tmp_path: Path) -> None:
        prune(str(built("llama")), out=tmp_path / "p", blocks="1", quiet=True)
        prune(str(built("llama")), out=tmp_path / "p", blocks="2,3", force=True, quiet=True)
        assert open_checkpoint(tmp_path / "p").original_blocks == (0, 1, 4, 5)
        assert [path.name for path in tmp_path.iterdir()] == ["p"]

    @pytest.mark.parametrize("where", ["", "inside", "../model"])
    @pytest.mark.fault(56)
    def test_output_is_or_lies_inside_the_input(self, copied: Built, where: str) -> None:
        model = copied("llama")
        before = {path.name: path.read_bytes() for path in model.iterdir()}
        with pytest.raises(ShortstackError, match="the input"):
            prune(str(model), out=model / where, blocks="1", force=True, quiet=True)
        assert {path.name: path.read_bytes() for path in model.iterdir()} == before

    @pytest.mark.fault(56)
    def test_output_is_a_link_to_the_input(self, copied: Built, tmp_path: Path) -> None:
        model = copied("llama")
        (tmp_path / "link").symlink_to(model)
        with pytest.raises(ShortstackError, match="is the input"):
            prune(str(model), out=tmp_path / "link", blocks="1", force=True, quiet=True)

    @pytest.mark.fault(57)
    def test_hub_cache(self, built: Built, tmp_path: Path) -> None:
        out = tmp_path / "models--some--model/snapshots/abc/p"
        with pytest.raises(ShortstackError, match="hub cache"):
            prune(str(built("llama")), out=out, blocks="1", quiet=True)

    @pytest.mark.fault(26)
    def test_nan_is_refused_and_named(self, copied: Built, tmp_path: Path) -> None:
        model = copied("llama", dtype=torch.bfloat16)
        tensors = load_file(model / "model.safetensors")
        tensors["model.layers.3.mlp.up_proj.weight"][1, 1] = float("-inf")
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ShortstackError, match=r"layers\.3\.mlp\.up_proj\.weight' holds NaN or infinity"):
            prune(str(model), out=tmp_path / "p", blocks="1", quiet=True)
        assert not (tmp_path / "p").exists()
        prune(str(model), out=tmp_path / "p", blocks="1", allow_nonfinite=True, quiet=True)
        prune(str(model), out=tmp_path / "q", blocks="3", quiet=True)  # the broken block is the one that goes

    @pytest.mark.fault(49, 50)
    def test_disk_full(self, built: Built, tmp_path: Path) -> None:
        """A limit on file sizes is the disk that fills up in the middle of a file."""
        code = (
            "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
            "from shortstack.cli.app import run; import sys; sys.exit(run(sys.argv[1:]))"
        )
        arguments = ["prune", str(built("llama")), "--out", str(tmp_path / "p"), "--blocks", "1"]
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert done.returncode == 1
        assert "could not be written" in done.stderr
        assert "Traceback" not in done.stderr
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.fault(49)
    def test_no_room(self, built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import shutil

        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 10))  # type: ignore[attr-defined]
        with pytest.raises(ShortstackError, match="GB needed"):
            prune(str(built("llama")), out=tmp_path / "p", blocks="1", quiet=True)

    @pytest.mark.fault(58)
    def test_second_writer_is_refused(self, built: Built, tmp_path: Path) -> None:
        from shortstack.runtime.atomic_output import published

        with published(tmp_path / "p") as stage:
            (stage / "shortstack.json").write_text("{}")
            code = "from shortstack.cli.app import run; import sys; sys.exit(run(sys.argv[1:]))"
            arguments = ["prune", str(built("llama")), "--out", str(tmp_path / "p"), "--blocks", "1"]
            done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
            assert done.returncode == 1
            assert "another shortstack process" in done.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["p"]

    @pytest.mark.parametrize("delay", [0.0, 0.02, 0.05, 0.1, 0.2])
    @pytest.mark.fault(51)
    def test_sigkill_leaves_no_output_and_the_next_run_succeeds(
        self, built: Built, tmp_path: Path, delay: float
    ) -> None:
        """Killed at swept times after the stage appeared: the output is absent or complete, never in between."""
        model = built("llama", num_hidden_layers=12, hidden_size=256, intermediate_size=1024, head_dim=64)
        code = "from shortstack.cli.app import run; import sys; sys.exit(run(sys.argv[1:]))"
        arguments = ["prune", str(model), "--out", str(tmp_path / "p"), "--blocks", "1"]
        process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while not list(tmp_path.glob(".p.shortstack-stage-*")) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        if (tmp_path / "p").exists():
            assert open_checkpoint(tmp_path / "p").depth == 11
        result = prune(str(model), out=tmp_path / "p", blocks="1", force=True, verify=True, quiet=True)
        assert result.verified is not None
        assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_plan_of_another_checkpoint(built: Built, tmp_path: Path) -> None:
    plan = plan_for(open_checkpoint(built("llama")), blocks="1").plan
    with pytest.raises(ShortstackError, match="another checkpoint"):
        prune(str(built("llama", seed=1)), out=tmp_path / "p", plan=plan, quiet=True)


def test_plan_and_options_contradict(built: Built, tmp_path: Path) -> None:
    plan = plan_for(open_checkpoint(built("llama")), blocks="1").plan
    with pytest.raises(UsageError, match="contradict"):
        prune(str(built("llama")), out=tmp_path / "p", plan=plan, blocks="2", quiet=True)
    for given, says in (({"plan": plan}, "with --plan"), ({"blocks": "1"}, "with --blocks")):
        more: dict[str, Any] = {**given, "criterion": "ppl", "plus": True, "strategy": "contiguous"}
        with pytest.raises(UsageError, match=rf"--criterion ppl, --plus, --strategy contiguous: no effect {says}"):
            prune(str(built("llama")), out=tmp_path / "p", quiet=True, **more)
    assert not (tmp_path / "p").exists()


def test_gpt2_scaled_by_block_index_keeps_its_numbers(built: Built, tmp_path: Path) -> None:
    model = built("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ShortstackError, match="only the last blocks"):
        prune(str(model), out=tmp_path / "p", blocks="1", quiet=True)
    prune(str(model), out=tmp_path / "p", blocks="4-5", verify=True, quiet=True)


def test_names_without_the_base_model(copied: Built, tmp_path: Path) -> None:
    """Published GPT-2 has `h.0.` on disk where the model has `transformer.h.0.`."""
    model = copied("gpt2")
    tensors = {
        name.removeprefix("transformer."): tensor for name, tensor in load_file(model / "model.safetensors").items()
    }
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    result = prune(str(model), out=tmp_path / "p", blocks="1,3", verify=True, quiet=True)
    assert result.verified is not None
    assert "h.3.ln_1.weight" in tensors_of(tmp_path / "p")


@pytest.mark.fault(35, 36)
def test_code_of_a_checkpoint_is_neither_copied_nor_run(copied: Built, tmp_path: Path) -> None:
    """Promise 5: a known family is loaded by its own class, whatever `auto_map` says."""
    model = copied("llama")
    (model / "modeling_own.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own", "AutoConfig": "modeling_own.OwnConfig"}
    (model / "config.json").write_text(json.dumps(config))
    from shortstack.evaluation.samples import evaluate_samples
    from shortstack.scoring.score import score

    (tmp_path / "x.txt").write_text("some text " * 50)
    score(str(model), data=str(tmp_path / "x.txt"), samples=2, seq_len=16, quiet=True)
    prune(str(model), out=tmp_path / "p", blocks="1", verify=True, quiet=True)
    evaluate_samples(str(model), prompt="ab", new_tokens=4, count=1)
    assert not (tmp_path / "executed").exists()
    assert "auto_map" not in json.loads((tmp_path / "p/config.json").read_text())


@pytest.mark.fault(57, 12)
def test_from_the_hub_cache(built: Built, tmp_path: Path) -> None:
    """A hub id that the cache holds: links into blobs are followed, nothing in the cache is written."""
    import shutil

    folder = tmp_path / "cache/models--some--model"
    snapshot = folder / "snapshots" / ("a" * 40)
    shutil.copytree(built("llama"), folder / "blobs")
    snapshot.mkdir(parents=True)
    for path in (folder / "blobs").iterdir():
        (snapshot / path.name).symlink_to(path)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("a" * 40)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    arguments = ["prune", "some/model", "--blocks", "1", "--out", str(tmp_path / "p")]
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "shortstack", *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    record = json.loads((tmp_path / "p/shortstack.json").read_text())
    assert record["source"] == "some/model"
    assert "base_model: some/model" in (tmp_path / "p/README.md").read_text()
