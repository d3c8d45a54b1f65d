"""Speculative decoding with a pruned draft: the dense model's text, how drafts fare, when they pay."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shortstack
from shortstack.artifacts.results import load_results
from shortstack.benchmark import draft as drafting
from shortstack.benchmark.draft import break_even
from shortstack.errors import ShortstackError
from tests import pico

FEW = {"runs": 4, "warmup": 1, "new_tokens": "8", "quiet": True}
SIZES = {"max_position_embeddings": 256}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("draft")
    dense = pico.build(folder / "dense", "llama", **SIZES)
    shortstack.prune(str(dense), out=folder / "cut", blocks="3", quiet=True)
    return str(dense), str(folder / "cut")


def test_the_text_is_the_dense_models(models: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "d.json"
    result = shortstack.bench(models[0], draft=models[1], draft_tokens=3, out=out, **FEW)  # type: ignore[attr-defined]
    (one,) = load_results(out).results
    figures = {name: figure.value for name, figure in one.figures.items()}
    assert result.exit_code == 0
    assert figures["identical"] == 1.0
    assert {len(one.per_item[name]) for name in ("dense_rate", "assisted_rate", "draft_rate", "accepted_length")} == {3}
    assert 0 <= figures["acceptance"] <= 1
    assert 0 <= figures["accepted_length"] <= 3
    assert figures["break_even_length"] == pytest.approx(3 * figures["draft_cost"] + figures["verify_cost"] - 1)
    assert (one.settings["draft"], one.settings["draft_tokens"]) == (models[1], 3)
    text = result.to_text()
    assert re.search(r"^dense rate, tokens/s +\d", text, re.MULTILINE)
    assert (
        "\nbreak even length: of 3, from the models' times" in text
        or "\nbreak even length: of 3: it cannot pay" in text
    )
    assert max(map(len, text.splitlines()[1:])) <= 100


def test_a_draft_that_is_the_model_is_always_accepted(models: tuple[str, str], tmp_path: Path) -> None:
    copy = pico.build(tmp_path / "copy", "llama", **SIZES)
    result = shortstack.bench(models[0], draft=str(copy), draft_tokens=3, **FEW)  # type: ignore[attr-defined]
    figures = result.results[0].figures
    assert figures["acceptance"].value == 1.0  # 8 tokens: passes of 3 + 1, 3 + 1
    assert figures["accepted_length"].value == 3.0


def test_when_a_draft_pays() -> None:
    # A draft of half the cost, 4 tokens at a time, verified at the price of one token: more than 2 must be accepted.
    assert break_even(4, 0.5, 1.0) == 2.0
    assert break_even(4, 1.0, 1.5) > 4  # never


def test_a_draft_that_cannot_pay_is_said(models: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafting, "break_even", lambda *_: 9.0)
    result = shortstack.bench(models[0], draft=models[1], **FEW)  # type: ignore[attr-defined]
    assert "it cannot pay" in result.to_text()


@pytest.mark.parametrize(("gap", "code", "says"), [(1e-6, 0, "up to rounding"), (0.1, 1, "which must not happen")])
def test_another_text_is_an_error_unless_rounding_explains_it(
    gap: float, code: int, says: str, models: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    generated = drafting._Pair.generated

    def other(self: Any, ids: Any, new_tokens: int, *, assisted: bool, of: Any = None) -> list[int]:
        tokens = generated(self, ids, new_tokens, assisted=assisted, of=of)
        return [*tokens[:-1], tokens[-1] + 1] if assisted else tokens

    monkeypatch.setattr(drafting._Pair, "generated", other)
    monkeypatch.setattr(drafting, "_gap", lambda *_: gap)
    result = shortstack.bench(models[0], draft=models[1], **FEW)  # type: ignore[attr-defined]
    assert result.exit_code == code
    assert "3 of 3 texts differ from its own, the worst at new token 7" in result.to_text()
    assert says in result.to_text()


def test_a_draft_with_another_vocabulary_is_refused(models: tuple[str, str], tmp_path: Path) -> None:
    larger = pico.build(tmp_path / "larger", "llama", vocab_size=300, **SIZES)
    with pytest.raises(ShortstackError, match="expected 260 tokens, found 300") as refused:
        shortstack.bench(models[0], draft=str(larger), **FEW)  # type: ignore[attr-defined]
    assert "pruned copy" in refused.value.hint
    swapped = pico.build(tmp_path / "swapped", "llama", **SIZES)
    path = swapped / "tokenizer.json"
    record = json.loads(path.read_text())
    vocabulary = record["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    path.write_text(json.dumps(record))
    with pytest.raises(ShortstackError, match="token 'A' is 37 there and 36 here|token 'A' is"):
        shortstack.bench(models[0], draft=str(swapped), **FEW)  # type: ignore[attr-defined]


def test_prompts_that_do_not_fit(built: Callable[..., Path]) -> None:
    with pytest.raises(ShortstackError, match="no prompt fits with 63 new tokens into 64 positions"):
        shortstack.bench(str(built("llama")), draft=str(built("llama", seed=1)), **{**FEW, "new_tokens": "63"})  # type: ignore[attr-defined]
