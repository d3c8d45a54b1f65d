"""What comes out: a plain checkpoint that is the running model, with everything else as it was, and its history."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import shortstack
from shortstack.common.progress import Progress
from shortstack.data.collators import Sharding
from shortstack.errors import ShortstackError
from shortstack.pruning.prune import prune
from shortstack.retraining.merge import merge
from shortstack.retraining.results import RetrainEstimate, RetrainResult
from tests import pico
from tests.kills import recorded_hashes

Built = Callable[..., Path]
Retrained = Callable[..., Any]
LONG = {"max_position_embeddings": 512}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.tensor(pico.windows(2, 20)), use_cache=False).logits
    return found


@pytest.fixture(scope="module")
def adapted(retrained: Retrained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adapted") / "out"
    retrained("lora", out)
    return out


def test_merged_is_what_the_adapter_gives(adapted: Path, pruned: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    apart = logits(PeftModel.from_pretrained(pico.load(pruned), adapted / "adapter"))
    merged = logits(pico.load(adapted))
    assert torch.allclose(merged, apart, atol=1e-4)
    assert not torch.allclose(merged, logits(pico.load(pruned)), atol=1e-2)
    # The same from the adapter alone, whose base is named in it.
    result = merge(adapted / "adapter", out=tmp_path / "merged", quiet=True)
    assert "folded into" in result.to_text()
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", adapted))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_merging_into_half_precision_rounds_once(adapted: Path, pruned: Path, tmp_path: Path) -> None:
    for dtype in ("bfloat16", "float16"):
        half = tmp_path / f"half-{dtype}"
        model = pico.load(pruned, getattr(torch, dtype))
        model.save_pretrained(half)
        pico.tokenizer().save_pretrained(half)
        merge(adapted / "adapter", base=str(half), out=tmp_path / dtype, quiet=True)
        found = load_file(tmp_path / dtype / "model.safetensors")
        base = load_file(half / "model.safetensors")
        factors = load_file(adapted / "adapter/adapter_model.safetensors")
        name = "model.layers.1.mlp.up_proj"
        a, b = (factors[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
        expected = (base[f"{name}.weight"].float() + (b @ a) * 2).to(getattr(torch, dtype))
        assert torch.equal(found[f"{name}.weight"], expected)


def test_an_adapter_of_another_model_is_refused(adapted: Path, built: Built, tmp_path: Path) -> None:
    for other in (built("llama", hidden_size=64), built("gpt2")):
        with pytest.raises(ShortstackError, match="does not fit") as error:
            merge(adapted / "adapter", base=str(other), out=tmp_path / "out", quiet=True)
        assert "--base MODEL" in error.value.hint
    assert not (tmp_path / "out").exists()


def test_an_adapter_without_weights_or_with_broken_ones(adapted: Path, tmp_path: Path) -> None:
    broken = tmp_path / "adapter"
    broken.mkdir()
    (broken / "adapter_config.json").write_bytes((adapted / "adapter/adapter_config.json").read_bytes())
    with pytest.raises(ShortstackError, match=r"no weights \(adapter_model.safetensors\)"):
        merge(broken, out=tmp_path / "out", quiet=True)
    factors = load_file(adapted / "adapter/adapter_model.safetensors")
    poisoned = next(iter(factors))
    save_file({**factors, poisoned: factors[poisoned] * float("nan")}, broken / "adapter_model.safetensors")
    with pytest.raises(ShortstackError, match="NaN"):
        merge(broken, out=tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_without_merge_there_is_the_adapter_alone(retrained: Retrained, tmp_path: Path) -> None:
    result = retrained("lora", tmp_path / "out", merge=False, max_steps=2)
    assert not (tmp_path / "out/model.safetensors").exists()
    assert (tmp_path / "out/adapter/adapter_model.safetensors").is_file()
    assert list(result.rows) == ["before", "dense"]


@pytest.mark.fault(103)
def test_a_dense_model_of_other_tokens_is_not_in_the_table(retrained: Retrained, dense: Path, tmp_path: Path) -> None:
    """Measured on the pruned model's tokens its figures would be of nothing."""
    other = tmp_path / "other"
    shutil.copytree(dense, other)
    tokenizer = pico.tokenizer()
    tokenizer.add_tokens([" the "])
    tokenizer.save_pretrained(other)
    result = retrained("lora", tmp_path / "out", max_steps=1, dense=str(other))
    assert list(result.rows) == ["before", "after"]
    assert any(f"{other} splits text into other tokens" in note for note in result.notes)
    result = retrained("lora", tmp_path / "again", max_steps=1, dense=str(dense))
    assert list(result.rows) == ["before", "after", "dense"]


@pytest.mark.parametrize("way", ["lora", "cpt"])
def test_everything_else_is_as_it_was(way: str, built: Built, retrained: Retrained, tmp_path: Path) -> None:
    """Tensor types and names, config (use_cache too), tokenizer, generation config."""
    dense = built("qwen2", dtype=torch.bfloat16, use_cache=False, **LONG)
    model = tmp_path / "model"
    prune(str(dense), blocks="2", out=model, quiet=True)
    # As published ones have them: settings of sampling without sampling, and in the wrong place.
    (model / "generation_config.json").write_text('{"temperature": 0.3}')
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "temperature": 0.9, "max_length": 20}))
    retrained(way, tmp_path / "out", model=model, max_steps=2)
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "out"))
    assert {name: (t.dtype, t.shape) for name, t in before.items()} == {n: (t.dtype, t.shape) for n, t in after.items()}
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (model / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name
    assert json.loads((tmp_path / "out/config.json").read_text())["use_cache"] is False
    assert (tmp_path / "out/model.safetensors").stat().st_mode & 0o777 == (model / "config.json").stat().st_mode & 0o777
    assert torch.isfinite(logits(pico.load(tmp_path / "out"))).all()


@pytest.mark.parametrize("save_dtype", ["float16", "bfloat16"])
def test_saved_in_another_type(save_dtype: str, retrained: Retrained, tmp_path: Path) -> None:
    retrained("lora", tmp_path / "out", max_steps=1, save_dtype=save_dtype)
    stored = load_file(tmp_path / "out/model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {getattr(torch, save_dtype)}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == save_dtype


def test_what_does_not_fit_the_type_is_refused(copied: Built, retrained: Retrained, tmp_path: Path) -> None:
    model = copied("llama", **LONG)
    stored = load_file(model / "model.safetensors")
    stored["model.embed_tokens.weight"][3, 0] = 1e6
    save_file(stored, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ShortstackError, match="is not finite once it is stored in float16"):
        retrained("lora", tmp_path / "out", model=model, max_steps=1, save_dtype="float16")
    assert not (tmp_path / "out").exists()


def test_cpt_then_lora_keeps_the_chain(retrained: Retrained, pruned: Path, dense: Path, tmp_path: Path) -> None:
    retrained("cpt", tmp_path / "cpt", max_steps=2)
    result = retrained("lora", tmp_path / "lora", model=tmp_path / "cpt", max_steps=2)
    record = json.loads((tmp_path / "lora/shortstack.json").read_text())
    assert [(step["stage"], step.get("method")) for step in record["steps"]] == [
        ("prune", None), ("retrain", "cpt"), ("retrain", "lora")
    ]  # fmt: skip
    assert record["source"] == json.loads((pruned / "shortstack.json").read_text())["source"]
    assert record["kept_blocks"] == [0, 1, 4, 5]
    assert record["steps"][2]["source"] == str(tmp_path / "cpt")
    assert list(result.rows) == ["before", "after", "dense"]
    card = (tmp_path / "lora/README.md").read_text()
    assert card.index("cpt") < card.index("lora")
    assert "### Retraining" in card
    assert str(tmp_path) not in card
    # A retrained checkpoint is pruned and retrained again like any other.
    prune(str(tmp_path / "lora"), blocks="1", out=tmp_path / "again", quiet=True)
    assert json.loads((tmp_path / "again/shortstack.json").read_text())["kept_blocks"] == [0, 4, 5]


def test_the_table_is_of_what_lies_on_the_disk(retrained: Retrained, text: Path, pruned: Path, tmp_path: Path) -> None:
    result = retrained("cpt", tmp_path / "out", eval_data=str(text), max_steps=4)
    for row, model in (("before", pruned), ("after", tmp_path / "out")):
        found = shortstack.evaluate(str(model), data=str(text), seq_len="128").results[0].figures["ppl_128"]
        assert result.rows[row]["figures"]["ppl:text.jsonl"] == pytest.approx(found.value, rel=1e-5)
    shown = result.to_text()
    assert all(word in shown for word in ("before", "after", "dense", "validation loss", "ppl:text.jsonl"))
    stored = json.loads((tmp_path / "out/retraining.json").read_text())["models"]
    assert stored == result.rows
    assert (tmp_path / "out/loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_text_is_followed_where_nothing_is_held_out(retrained: Retrained, text: Path, tmp_path: Path) -> None:
    retrained("cpt", tmp_path / "out", eval_data=str(text), validation=0, max_steps=4)
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    followed = {line["step"]: line["ppl:text.jsonl"] for line in lines if "ppl:text.jsonl" in line}
    assert list(followed) == [2, 4]
    assert not any("validation" in line for line in lines)


def test_the_best_is_kept_not_the_last(retrained: Retrained, tmp_path: Path) -> None:
    """LoRA as published keeps the lowest validation loss: noise learnt by heart makes other noise less likely."""
    noise = random.Random(0)
    rows = [{"instruction": "Say it", "output": "".join(noise.choices(ascii_lowercase, k=60))} for _ in range(6)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    options = {"validation": 2, "max_steps": 40, "eval_every": 8, "save_every": 8}
    result = retrained("lora", tmp_path / "out", data=str(tmp_path / "rows.json"), lr=0.03, warmup=0, **options)
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    validated = {line["step"]: line["validation"] for line in lines if "validation" in line}
    best = min(validated, key=lambda step: validated[step])
    assert validated[best] < validated[40] - 0.1, "the test needs a run that gets worse"
    assert json.loads((tmp_path / "out/shortstack.json").read_text())["steps"][-1]["kept_step"] == best
    assert result.rows["after"]["figures"]["validation"] == pytest.approx(validated[best], rel=1e-3)


@pytest.mark.parametrize("way", ["lora", "cpt", "distill", "offline"])
def test_a_dry_run_trains_nothing(way: str, retrained: Retrained, tmp_path: Path) -> None:
    found = retrained(way, tmp_path / "out", dry_run=True)
    assert isinstance(found, RetrainEstimate)
    assert list(tmp_path.iterdir()) == []
    assert found.steps == 8
    assert found.seconds_per_step > 0
    assert (found.trained == found.parameters) == (way != "lora")
    assert found.bytes_per_device["optimizer"] == 2 * found.bytes_per_device["gradients"] == 8 * found.trained
    shown = found.to_text()
    assert "nothing was trained" in shown
    assert "memory per device" in shown
    assert "disk: about " in shown
    assert "not measured, and on top: the time and memory of validation and of saving" in shown
    assert "would fail" not in shown
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("precious")
    assert "would fail: " in retrained(way, tmp_path / "out", dry_run=True).to_text()


def test_steps_and_tokens_of_a_dry_run_are_those_of_the_run(retrained: Retrained, tmp_path: Path) -> None:
    expected = retrained("cpt", tmp_path / "o", dry_run=True, max_steps=None, tokens="3K")
    result = retrained("cpt", tmp_path / "out", max_steps=None, tokens="3K")
    assert isinstance(result, RetrainResult)
    assert (result.steps, result.tokens) == (expected.steps, expected.tokens) == (24, 3072)


@pytest.mark.parametrize("way", ["lora", "distill", "offline", "local"])
def test_tokens_are_those_of_the_rows_wherever_they_are_said(
    retrained: Retrained, built: Built, tmp_path: Path, rows: Path, way: str
) -> None:
    """Rows of other lengths, padded in batches: dry run, result, record, metrics and card count the same tokens."""
    from shortstack.data.loaders import ExampleDataset, open_dataset
    from shortstack.data.tokenizer import load_tokenizer
    from shortstack.families.open_model import open_checkpoint

    on_rows: dict[str, Any] = {"data": str(rows), "seq_len": 400} if way in ("distill", "local") else {}
    on_rows |= {"tokens": "3000"} if way == "local" else {}  # in four steps, of two blocks
    expected = retrained(way, tmp_path / "o", dry_run=True, **on_rows)
    result = retrained(way, tmp_path / "out", **on_rows)
    record = json.loads((tmp_path / "out/shortstack.json").read_text())["steps"][-1]
    metrics = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    (line,) = [one for one in metrics if one["step"] == 8 and "tokens" in one]
    assert result.tokens == expected.tokens == record["tokens"] == line["tokens"]
    assert f"8 steps, {result.tokens} tokens" in (tmp_path / "out/README.md").read_text()
    if way == "offline":
        return
    checkpoint = open_checkpoint(built("llama"))
    dataset = open_dataset(str(rows), load_tokenizer(checkpoint), seq_len=400, progress=Progress(quiet=True))
    assert isinstance(dataset, ExampleDataset)
    assert len(set(dataset.lengths)) > 3
    batches = dataset.loader(Sharding(4, 2), 0, 4 if way == "local" else 8, {}, 0)  # each block on the same text
    assert result.tokens == sum(int(batch["attention_mask"].sum()) for batch in batches)


def test_the_cutoff_is_clamped_with_a_line(
    built: Built, retrained: Retrained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    retrained("cpt", tmp_path / "out", model=built("llama"), seq_len=100, max_steps=1, quiet=False)
    assert "has 64 positions: 100 tokens are cut to 64" in capsys.readouterr().err


def test_an_output_that_is_there_is_kept(retrained: Retrained, adapted: Path, pruned: Path, tmp_path: Path) -> None:
    from tests.kills import hashes

    before = hashes(adapted)
    with pytest.raises(ShortstackError, match="exists"):
        retrained("lora", adapted)
    assert hashes(adapted) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("x")
    with pytest.raises(ShortstackError, match="exists"):
        retrained("cpt", tmp_path / "mine", force=True)
    with pytest.raises(ShortstackError, match=r"input|itself|inside"):
        retrained("cpt", pruned, force=True)


def test_a_tracker_that_is_not_installed_is_named(retrained: Retrained, tmp_path: Path) -> None:
    with pytest.raises(ShortstackError, match="trackio"):
        retrained("cpt", tmp_path / "out", report_to="trackio")
    with pytest.raises(ShortstackError, match="excel"):
        retrained("cpt", tmp_path / "out", report_to="excel")


def test_an_adapter_on_four_bits(retrained: Retrained, tmp_path: Path) -> None:
    """The base is held in 4 bit while training; what comes out is merged into the weights as they are stored."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")
    result = retrained("lora", tmp_path / "out", load_in_4bit=True, max_steps=4)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out/model.safetensors").values()} == {torch.float32}
    assert result.rows["after"]["figures"]["validation"] < result.rows["before"]["figures"]["validation"]


@pytest.mark.fault(107)
@pytest.mark.parametrize(
    ("way", "options"),
    [("lora", {}), ("lora", {"merge": False}), ("cpt", {"save_dtype": "bfloat16"}), ("distill", {})],
)
def test_every_file_is_hashed(way: str, options: dict[str, Any], retrained: Retrained, tmp_path: Path) -> None:
    retrained(way, tmp_path / "out", max_steps=1, **options)
    assert {"metrics.jsonl", "retraining.json"} <= recorded_hashes(tmp_path / "out").keys()


@pytest.mark.fault(107)
def test_every_file_of_a_merged_checkpoint_is_hashed(adapted: Path, tmp_path: Path) -> None:
    merge(adapted / "adapter", out=tmp_path / "merged", quiet=True)
    assert "model.safetensors" in recorded_hashes(tmp_path / "merged")


@pytest.mark.fault(111)
def test_infinite_perplexities_are_written_as_json_and_shown(
    retrained: Retrained, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shortstack.retraining.validation.mean_nll", lambda *_: 900.0)
    found = retrained("cpt", tmp_path / "out", max_steps=1, eval_data=str(text))
    assert "inf" in found.to_text()
    for name in ("retraining.json", "metrics.jsonl"):
        for line in (tmp_path / "out" / name).read_text().split("\n" if name.endswith("l") else "\0"):
            if line:
                json.loads(line, parse_constant=lambda constant: pytest.fail(constant))
    record = json.loads((tmp_path / "out/retraining.json").read_bytes())
    assert record["models"]["after"]["figures"][f"ppl:{text.name}"] is None
    assert record["not_finite"][f"/models/after/figures/ppl:{text.name}"] == "Infinity"


def test_rows_that_predict_nothing_have_no_validation_loss(pruned: Path) -> None:
    from shortstack.retraining.validation import ValidationSet

    ids = torch.ones((1, 4), dtype=torch.long)
    batch = {"input_ids": ids, "targets": torch.full_like(ids, -100)}
    assert ValidationSet([batch]).measure(pico.load(pruned), torch.device("cpu")) == {}
