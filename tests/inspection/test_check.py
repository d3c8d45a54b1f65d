"""`shortstack check` finds, in checkpoints as other tools leave them, what transformers loads without a word."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shortstack.cli.app import run
from shortstack.common.progress import Progress
from shortstack.inspection.check import check
from shortstack.pruning.prune import prune

Built = Callable[..., Path]


def failed(model: Path) -> dict[str, str]:
    return {
        finding.what: finding.says for finding in check(str(model), quiet=True).findings if finding.status == "fail"
    }


def edit(model: Path, name: str = "config.json", **entries: Any) -> Path:
    path = model / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    return model


def cut(model: Path, removed: set[int], *, renumber: bool = True) -> Path:
    """Drop blocks as scripts do: tensors only."""
    tensors = load_file(model / "model.safetensors")
    kept = [index for index in range(6) if index not in removed]
    left = {}
    for name, tensor in tensors.items():
        if not name.startswith("model.layers."):
            left[name] = tensor
        elif (index := int(name.split(".")[2])) in kept:
            left[name.replace(f".{index}.", f".{kept.index(index) if renumber else index}.", 1)] = tensor
    save_file(left, model / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
def test_sound_ones_pass(built: Built, family: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", str(built(family)), "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert "nothing failed" in shown
    for what in ("cached generation", "static cache", "missing keys", "unexpected keys", "positions", "tokenizer"):
        assert what in shown


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_what_shortstack_wrote_passes(built: Built, family: str, tmp_path: Path) -> None:
    prune(str(built(family)), out=tmp_path / "p", blocks="0,3", quiet=True)
    assert failed(tmp_path / "p") == {}


def test_old_count_kept(copied: Built) -> None:
    """transformers would add random blocks."""
    assert "the weights lack block 4-5" in failed(cut(copied("llama"), {1, 2}))["blocks"]


def test_blocks_not_renumbered(copied: Built) -> None:
    model = edit(cut(copied("llama"), {1, 2}, renumber=False), num_hidden_layers=4)
    assert "the weights lack block 1-2" in failed(model)["blocks"]


def test_lists_not_shortened(copied: Built) -> None:
    model = edit(cut(copied("qwen2"), {1, 2}), num_hidden_layers=4)
    assert "layer_types has 6 entries for 4 blocks" in failed(model)["per-block lists"]


def test_head_left_random(copied: Built) -> None:
    """Tied, saved without a head, and the config says untied."""
    model = edit(copied("llama", tie_word_embeddings=True), tie_word_embeddings=False)
    assert "lack lm_head.weight" in failed(model)["head, widths, types"]


def test_a_missing_tensor(copied: Built) -> None:
    model = copied("llama")
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert failed(model)["missing keys"] == "model.layers.3.mlp.up_proj.weight (1)"


def test_a_tensor_left_over(copied: Built) -> None:
    model = copied("llama")
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, "model.extra.weight": torch.ones(2)}, model / "model.safetensors", metadata={"format": "pt"})
    assert failed(model)["unexpected keys"] == "model.extra.weight (1)"


def test_not_a_number(copied: Built) -> None:
    model = copied("llama")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    found = failed(model)
    assert "layers.3.mlp.up_proj" in found["values"]
    assert found["forward"] == "logits hold NaN or infinity"


def test_tokenizer_forgotten(built: Built) -> None:
    assert "no tokenizer in the directory" in failed(built("llama", with_tokenizer=False))["tokenizer"]


def test_tokenizer_of_another_model(copied: Built) -> None:
    model = copied("llama", vocab_size=200)
    assert failed(model)["tokenizer"] == "token id 258, but the embedding has 200 rows"


def test_end_of_text_of_another_model(copied: Built) -> None:
    assert failed(edit(copied("llama"), eos_token_id=7))["end of text"] == "config says 7, the tokenizer 2"


@pytest.mark.parametrize("template", ["{% if %}", "{{ 'nothing' }}"])
def test_chat_template_that_does_not_render(copied: Built, template: str) -> None:
    model = copied("llama")
    (model / "chat_template.jinja").write_text(template)
    assert "chat template" in failed(model)


def test_use_cache_left_off_is_a_note(copied: Built) -> None:
    found = check(str(edit(copied("llama"), use_cache=False)), quiet=True)
    assert [finding.status for finding in found.findings if finding.what == "use_cache"] == ["note"]


def test_files_that_were_changed_after_shortstack_wrote_them(built: Built, tmp_path: Path) -> None:
    prune(str(built("llama")), out=tmp_path / "p", blocks="1", quiet=True)
    edit(tmp_path / "p", "generation_config.json", bos_token_id=5)
    assert failed(tmp_path / "p")["recorded hashes"].startswith("generation_config.json is not the file")


def said(model: Path, what: str = "recorded hashes", **options: Any) -> list[tuple[str, str]]:
    found = check(str(model), quiet=True, **options).findings
    return [(finding.status, finding.says) for finding in found if finding.what == what]


@pytest.fixture
def pruned(built: Built, tmp_path: Path) -> Path:
    prune(str(built("llama", shard_bytes=40_000)), out=tmp_path / "p", blocks="1", quiet=True)
    return tmp_path / "p"


def recorded(model: Path) -> dict[str, str]:
    files: dict[str, str] = json.loads((model / "shortstack.json").read_text())["files"]
    return files


@pytest.mark.fault(107)
def test_every_hash_that_is_reported_was_computed(pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large files too: they are hashed in the pass that looks for NaN."""
    monkeypatch.setattr("shortstack.inspection.check_bytes.LARGE", 1)
    count = len(recorded(pruned))
    assert said(pruned) == [("ok", f"{count} of {count} files computed: as shortstack.json records them")]
    shard = next(pruned.glob("*.safetensors"))
    data = shard.read_bytes()
    shard.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    assert said(pruned) == [("fail", f"{shard.name} is not the file that shortstack.json records")]


@pytest.mark.fault(107)
def test_quick_reports_what_it_skips(pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(pruned, quick=True)[0][0] == "ok"  # nothing here is large
    largest = max(pruned.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    monkeypatch.setattr("shortstack.inspection.check_bytes.LARGE", largest.stat().st_size)
    monkeypatch.setattr("shortstack.inspection.check.LARGE", largest.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1] + b"\xff")
    (ok, skipped) = said(pruned, quick=True)
    assert ok[0] == "ok"
    assert int(ok[1].split()[0]) < len(recorded(pruned))
    assert skipped[0] == "skip"
    assert largest.name in skipped[1]
    assert [status for status, _ in said(pruned, "values", quick=True)] == ["ok", "skip"]
    assert said(pruned, "loads", quick=True)[0][0] == "skip"
    found = check(str(pruned), quick=True, quiet=True)
    assert found.exit_code == 0
    assert found.to_json()["complete"] is False
    assert "skipped" in found.to_text().splitlines()[-1]
    assert said(pruned)[0][0] == "fail"


@pytest.mark.fault(107)
def test_recorded_files_that_are_missing_fail(pruned: Path) -> None:
    for name in ("generation_config.json", "tokenizer_config.json"):
        (pruned / name).unlink()
    (fails,) = said(pruned)
    assert fails == (
        "fail", "missing, though shortstack.json records it: generation_config.json, tokenizer_config.json"
    )  # fmt: skip


@pytest.mark.fault(107)
def test_what_was_not_recorded_is_said(pruned: Path) -> None:
    record = json.loads((pruned / "shortstack.json").read_text())
    shard = next(pruned.glob("*.safetensors")).name
    record["files"] = {n: h for n, h in record["files"].items() if n not in ("config.json", shard)}
    (pruned / "shortstack.json").write_text(json.dumps(record))
    assert [status for status, _ in said(pruned)] == ["ok", "skip"]
    assert f"records no hash of config.json, {shard}" in said(pruned)[1][1]
    record["files"] = {"../outside": "0"}
    (pruned / "shortstack.json").write_text(json.dumps(record))
    assert said(pruned)[0] == (
        "fail",
        "../outside is not the file that shortstack.json records",
    )
    del record["files"]
    (pruned / "shortstack.json").write_text(json.dumps(record))
    assert [status for status, _ in said(pruned)] == ["skip"]
    (pruned / "shortstack.json").unlink()
    assert [status for status, _ in said(pruned)] == ["note"]


@pytest.mark.fault(107)
def test_files_that_came_later_are_said(pruned: Path) -> None:
    (pruned / "adapter").mkdir()
    (pruned / "adapter/adapter_model.safetensors").write_bytes(b"x")
    (pruned / ".gitattributes").write_text("the hub adds it")
    (ok, skipped) = said(pruned)
    assert ok[0] == "ok"
    assert skipped == ("skip", "shortstack.json records no hash of adapter/adapter_model.safetensors")


def test_progress_reaches_the_size_of_all_that_is_hashed(pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar for the weights and one for every other recorded file: each ends at its total."""
    bars: dict[str, tuple[int, list[int]]] = {}

    @contextlib.contextmanager
    def bar(_: Progress, what: str, total: int, unit: str) -> Iterator[Callable[[int], object]]:
        bars[what] = total, []
        yield bars[what][1].append

    monkeypatch.setattr(Progress, "bar", bar)
    check(str(pruned), quiet=True)
    shards = sum(path.stat().st_size for path in pruned.glob("*.safetensors"))
    others = sum((pruned / name).stat().st_size for name in recorded(pruned)) - shards
    assert bars["hashes"] == (others, bars["hashes"][1])
    assert sum(bars["hashes"][1]) == others
    assert bars["values"][0] == shards
    assert 0.9 * shards < sum(bars["values"][1]) <= shards


def test_a_card_may_be_edited(pruned: Path) -> None:
    (pruned / "README.md").write_text("mine")
    assert [status for status, _ in said(pruned)] == ["note", "ok"]


def test_files_that_the_hub_did_not_send_are_not_missing(pruned: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--o--n/snapshots/0"
    snapshot.parent.mkdir(parents=True)
    pruned.rename(snapshot)
    record = json.loads((snapshot / "shortstack.json").read_text())
    record["files"]["loss.png"] = "0" * 64  # no file that is downloaded with a model
    (snapshot / "shortstack.json").write_text(json.dumps(record))
    assert [status for status, _ in said(snapshot)] == ["ok", "skip"]
    (snapshot / "generation_config.json").unlink()
    assert "fail" in [status for status, _ in said(snapshot)]


def test_types_that_nobody_looks_into_are_said(copied: Built) -> None:
    model = copied("llama")
    tensors = load_file(model / "model.safetensors")
    scales = torch.ones(2).to(torch.float8_e8m0fnu)
    save_file({**tensors, "model.extra.scale": scales}, model / "model.safetensors", metadata={"format": "pt"})
    assert said(model, "values")[1] == ("skip", "not looked for NaN in tensors of type F8_E8M0")


def test_cached_generation_that_differs(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does where a model's blocks are not renumbered in memory: here the cache is made to lie."""
    from transformers.cache_utils import DynamicCache

    real = DynamicCache.update

    def update(self: Any, keys: Any, values: Any, *args: Any, **kwargs: Any) -> Any:
        keys, values = real(self, keys, values, *args, **kwargs)
        return keys, values.flip(-1) if values.shape[2] > 9 else values

    monkeypatch.setattr(DynamicCache, "update", update)
    assert "gives other tokens than without a cache" in failed(built("llama"))["cached generation"]


def test_models_that_only_fit_as_they_are_stored(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    model = built("llama", dtype=torch.bfloat16)
    stored = (model / "model.safetensors").stat().st_size
    monkeypatch.setattr("shortstack.inspection.check_running.available_bytes", lambda: int(1.5 * stored))
    assert failed(model) == {}
    monkeypatch.setattr("shortstack.inspection.check_running.available_bytes", lambda: stored // 2)
    notes = [f.says for f in check(str(model), quiet=True).findings if f.what == "loads"]
    assert notes[0].startswith("not tried: ")


def test_an_architecture_that_is_not_in_the_table(copied: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    from shortstack.families import table as anatomy

    monkeypatch.delitem(anatomy.FAMILIES, "llama")
    model = copied("llama")
    assert failed(model) == {}
    cut(model, {5})
    assert "missing keys" in failed(model)


def test_one_line_each_and_an_exit_code(copied: Built, capsys: pytest.CaptureFixture[str]) -> None:
    model = copied("llama")
    (model / "config.json").write_text("{")
    assert run(["check", str(model), "--quiet"]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert shown[1].startswith("  FAIL  config")
    assert run(["check", str(model), "--quiet", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


@pytest.mark.fault(77)
def test_names_cannot_write_to_the_terminal(copied: Built, capsys: pytest.CaptureFixture[str]) -> None:
    model = copied("llama")
    tensors = load_file(model / "model.safetensors")
    odd = {**tensors, "model.\x1b[31mred": torch.ones(2)}
    save_file(odd, model / "model.safetensors", metadata={"format": "pt"})
    run(["check", str(model), "--quiet"])
    assert "\x1b" not in capsys.readouterr().out
