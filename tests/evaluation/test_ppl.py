"""Perplexity from its definition, and sample continuations."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shortstack.errors import ShortstackError, UsageError
from shortstack.evaluation import ppl as perplexity
from shortstack.evaluation.compare import compared
from shortstack.evaluation.options import EvaluationOptions
from shortstack.evaluation.ppl import cut_windows, evaluate_ppl, window_nll
from shortstack.evaluation.samples import evaluate_samples
from shortstack.families.open_model import open_checkpoint
from shortstack.runtime.workspace import cache_folder
from tests import oracle, pico

Built = Callable[..., Path]
QUIET = EvaluationOptions(quiet=True)
FRESH = EvaluationOptions(fresh=True)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = ["the first row", "", "another one that is longer than the others are " * 6, "é and the end"]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def test_windows_from_the_definition() -> None:
    ids = list(range(10, 33))
    assert cut_windows(ids, 1, 8, bos_every=False) == [[1, *ids[:7]], ids[7:15], ids[15:23]]
    assert cut_windows(ids, 1, 8, bos_every=True) == [[1, *ids[:8]], [1, *ids[8:16]]]
    assert cut_windows(ids, None, 8, bos_every=False) == [ids[:8], ids[8:16]]


@pytest.mark.parametrize("batch", [None, 1, 3])
@pytest.mark.parametrize("bos_every", [False, True])
def test_equals_ten_naive_lines(built: Built, text: Path, bos_every: bool, batch: int | None) -> None:
    model = built("llama")
    options = EvaluationOptions(batch=batch or "auto", quiet=True)
    rule: Any = "every" if bos_every else "first"
    (result,) = evaluate_ppl(str(model), data=str(text), seq_len="32", bos=rule, options=options).results
    rows = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    ids = pico.tokenizer()("\n\n".join(rows), add_special_tokens=False)["input_ids"]
    stream = ids if bos_every else [1, *ids]
    windows = [stream[k : k + 32] for k in range(0, len(stream) - 31, 32)]
    windows = [[1, *window] for window in windows] if bos_every else windows
    with torch.no_grad():
        nll = oracle.mean_nll(pico.load(model), windows)
    figure = result.figures["ppl_32_bos_every" if bos_every else "ppl_32"]
    assert figure.value == pytest.approx(math.exp(nll.mean()), rel=1e-5)
    assert figure.n == len(windows) * (32 if bos_every else 31)
    assert figure.stderr == pytest.approx(
        math.exp(nll.mean()) * float(nll.std(correction=1)) / len(windows) ** 0.5, rel=1e-4
    )
    assert result.per_item["ppl_32_bos_every" if bos_every else "ppl_32"] == pytest.approx(nll.tolist(), rel=1e-5)
    assert len(result.figures) == len(result.per_item) == 1


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """The number of windows of each measurement, with a cache that is empty at first."""
    monkeypatch.setenv("SHORTSTACK_CACHE", str(tmp_path / "kept"))
    found: list[int] = []
    real = perplexity.window_nll

    def measured(model: Any, windows: Any, *rest: Any, **options: Any) -> list[float]:
        found.append(len(windows))
        return real(model, windows, *rest, **options)

    monkeypatch.setattr(perplexity, "window_nll", measured)
    return found


def test_one_bos_rule_is_measured_unless_both_are_requested(built: Built, text: Path, counted: list[int]) -> None:
    model = str(built("llama"))
    by_rule = {
        rule: evaluate_ppl(model, data=str(text), seq_len="32", bos=rule, options=FRESH).results[0]
        for rule in ("first", "every", "both")
    }
    (default,) = evaluate_ppl(model, data=str(text), seq_len="32", options=FRESH).results
    assert len(counted) == 1 + 1 + 2 + 1
    assert list(default.figures) == list(by_rule["first"].figures) == ["ppl_32"]
    assert list(by_rule["every"].figures) == ["ppl_32_bos_every"]
    assert by_rule["both"].figures == {**by_rule["first"].figures, **by_rule["every"].figures}
    assert default.figures == by_rule["first"].figures


def test_what_was_found_of_both_rules_is_not_measured_again(built: Built, text: Path, counted: list[int]) -> None:
    """As every earlier version kept it: under a key without a rule, and with its notes beside it."""
    model = str(built("llama"))
    options: dict[str, Any] = {"data": str(text), "seq_len": "32,64", "options": QUIET}
    (both,) = evaluate_ppl(model, bos="both", **options).results
    assert len(counted) == 3, "65 tokens are more than the positions"
    (file,) = (cache_folder() / "results").iterdir()
    record = json.loads(file.read_text())
    assert not {"bos", "limit"} & record["key"]["what"].keys()
    del record["found"]["found"]["windows"]
    record["found"]["found"]["notes"].append(f"{model}: ppl_64_bos_every is not there: 65 tokens")
    file.write_text(json.dumps(record))
    for rule in ("first", "every"):
        (found,) = evaluate_ppl(model, bos=rule, **options).results
        names = [name for name in both.figures if name.endswith("_bos_every") == (rule == "every")]
        assert found.figures == {name: both.figures[name] for name in names}
        assert found.data == {**both.data, "windows": {name: both.data["windows"][name] for name in found.per_item}}
        assert len(found.notes) == (rule == "every")
    assert len(counted) == 3


@pytest.mark.fault(140)
def test_a_limit_takes_the_first_windows_and_says_of_how_many(built: Built, text: Path, counted: list[int]) -> None:
    model = str(built("llama"))
    (whole,) = evaluate_ppl(model, data=str(text), seq_len="32", options=QUIET).results
    results = evaluate_ppl(model, data=str(text), seq_len="32", bos="both", limit=3, options=QUIET)
    (found,) = results.results
    assert counted[1:] == [3, 3]
    assert found.per_item["ppl_32"] == pytest.approx(whole.per_item["ppl_32"][:3], rel=1e-5)
    assert found.figures["ppl_32"].n == 3 * 31
    of = counted[0]
    assert whole.data["windows"] == {"ppl_32": {"used": of, "of": of}}
    assert found.data["windows"]["ppl_32"] == {"used": 3, "of": of}
    assert (whole.settings["limit"], found.settings["limit"]) == (None, 3)
    assert f"ppl_32 is over the first 3 of {of} windows" in results.to_text()
    comparison = compared([whole, replace(found, model="other")], None, [])
    assert comparison.figures[0].differences == [None, None]
    assert "other was measured with another limit (3, not none) and is not compared" in comparison.to_text()
    (enough,) = evaluate_ppl(model, data=str(text), seq_len="32", limit=of, options=QUIET).results
    assert (enough.settings, enough.data, enough.notes) == (whole.settings, whole.data, []), "nothing was left out"
    with pytest.raises(UsageError, match="--limit 0: expected at least 1 window"):
        evaluate_ppl(model, data=str(text), limit=0, options=QUIET)


@pytest.mark.parametrize("length", [2, 7, 64])
@pytest.mark.parametrize("batch", ["auto", 1, 5])
def test_every_length_and_batch_equals_padded_batches_of_transformers(built: Built, length: int, batch: Any) -> None:
    """The oracle runs the windows side by side with longer ones, padded on the left, under a mask."""
    directory, windows = built("llama"), pico.windows(11, length, seed=length)
    found = window_nll(
        pico.load(directory), windows, open_checkpoint(directory), batch=batch, device=torch.device("cpu")
    )
    padding = 64 - length
    ids = torch.tensor([[0] * padding + window for window in windows])
    mask = torch.tensor([[0] * padding + [1] * length for _ in windows])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = pico.load(directory)(ids, attention_mask=mask, position_ids=positions).logits[:, padding:-1].double()
    expected = -logits.log_softmax(-1).gather(2, ids[:, padding + 1 :, None])[..., 0].mean(1)
    assert found == pytest.approx(expected.tolist(), rel=1e-5)


def test_bos_everywhere_beyond_the_positions_is_null_with_a_line(built: Built, text: Path) -> None:
    found = evaluate_ppl(str(built("llama")), data=str(text), seq_len="64", bos="both", options=QUIET)
    figure = found.results[0].figures["ppl_64_bos_every"]
    assert figure.value is None
    assert "65 tokens, but the model has 64 positions" in figure.note
    assert "65 tokens, but the model has 64 positions" in found.to_text()
    assert found.to_json()["figures"]["ppl_64_bos_every"]["value"] is None


def test_too_little_text(built: Built, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("short")
    with pytest.raises(ShortstackError, match="a window of 32 tokens needs 32 tokens, found 5"):
        evaluate_ppl(str(built("llama")), data=str(tmp_path / "x.txt"), seq_len="32", options=QUIET)


def test_nan_is_an_error_and_not_a_figure(copied: Built, text: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = copied("llama")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ShortstackError, match="not finite"):
        evaluate_ppl(str(model), data=str(text), seq_len="32", options=QUIET)


def test_several_models_and_texts_side_by_side(built: Built, text: Path, tmp_path: Path) -> None:
    (tmp_path / "y.txt").write_text("another text. " * 40)
    found = evaluate_ppl(
        str(built("llama")), str(built("gemma2")), data=f"{text},{tmp_path / 'y.txt'}", seq_len="16,32",
        bos="both", out=tmp_path / "r.json", options=QUIET,
    )  # fmt: skip
    assert len(found.results) == 4
    records = json.loads((tmp_path / "r.json").read_text())
    for record in records:
        assert record["schema"] == 1
        assert {"model", "fingerprint", "what", "data", "settings", "figures", "per_item", "versions"} <= record.keys()
        assert set(record["figures"]) == {"ppl_16", "ppl_16_bos_every", "ppl_32", "ppl_32_bos_every"}
    assert records[0]["data"]["sha256"] != records[1]["data"]["sha256"]
    assert str(built("gemma2")) in found.to_text()


def test_samples_are_the_same_for_the_same_seed(built: Built) -> None:
    options = {"prompt": "abc", "count": 2, "new_tokens": 12}
    state = torch.random.get_rng_state()
    first, second = (
        evaluate_samples(str(built("llama")), **options, options=FRESH).results[0].per_item["texts"]  # type: ignore[arg-type]
        for _ in range(2)
    )
    assert torch.equal(state, torch.random.get_rng_state())
    assert first == second
    assert len(first) == 2
    other = evaluate_samples(str(built("llama")), seed=2, **options).results[0].per_item["texts"]  # type: ignore[arg-type]
    assert other != first


def test_samples_beyond_the_positions(built: Built) -> None:
    with pytest.raises(ShortstackError, match="3 new ones|64 positions"):
        evaluate_samples(str(built("llama")), prompt="abc")


def test_no_tokenizer(copied: Built, text: Path) -> None:
    model = copied("llama", with_tokenizer=False)
    with pytest.raises(ShortstackError, match="no tokenizer in the directory"):
        evaluate_ppl(str(model), data=str(text), options=QUIET)


@pytest.mark.fault(103)
def test_the_unit_is_recorded_and_another_tokenizer_is_not_compared(built: Built, text: Path, tmp_path: Path) -> None:
    model = built("llama")
    copies = [tmp_path / "same", tmp_path / "other", tmp_path / "no bos"]
    for copy in copies:
        shutil.copytree(model, copy)
    other = pico.tokenizer()
    other.add_tokens(["the first"])  # one token where the others need nine
    other.save_pretrained(copies[1])
    none = pico.tokenizer()
    none.bos_token = None
    none.save_pretrained(copies[2])
    found = evaluate_ppl(str(model), *map(str, copies), data=str(text), seq_len="32", options=QUIET)
    dense, same, changed, bare = found.results
    assert dense.settings["seq_len"] == [32]
    assert dense.settings["bos_token"] == 1
    assert dense.settings["tokenizer"] == same.settings["tokenizer"] != changed.settings["tokenizer"]
    assert (bare.settings["tokenizer"], bare.settings["bos_token"]) == (dense.settings["tokenizer"], None)
    (figure, *_) = compared(found.results, None, []).figures
    assert [difference is None for difference in figure.differences] == [True, False, True, True]
    assert f"ppl of {copies[1]} and of {model}: they differ in the tokenizer," in found.to_text()
    assert f"ppl of {copies[2]} and of {model}: they differ in the BOS rule," in found.to_text()
