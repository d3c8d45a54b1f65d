"""README.md of every checkpoint that is written: what it says, in the hub's form, and what it never says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from shortstack.pruning.prune import prune
from shortstack.publishing.card_text import base_model_of, carried_over, front_matter, model_card
from tests.hub_push_server import card_errors

Built = Callable[..., Path]
CARD = """---
license: apache-2.0
language: [en, de]
license_link: LICENSE
tags: [mine]
base_model: their/base
---
# Base
"""


def record(**changes: Any) -> dict[str, Any]:
    """A shortstack.json of a model from the hub."""
    prune_step = {
        "stage": "prune", "criterion": "ppl", "before": {"parameters": 1000}, "after": {"parameters": 800},
        "why": {"scores": {"calibration": {"source": "/home/ann/data/mine.txt"}}}, "versions": {"shortstack": "0.1.0"},
    }  # fmt: skip
    made = {
        "source": "org/base@v2", "base_model": "org/base", "revision": "a" * 40, "original_depth": 6,
        "kept_blocks": [0, 1, 4, 5], "steps": [prune_step], "files": {"LICENSE.txt": "0", "config.json": "0"},
    }  # fmt: skip
    return {**made, **changes}


def test_what_it_is_how_it_was_made_how_it_is_used_and_whose_licence_holds() -> None:
    card: Any = ModelCard(model_card(record(), {"license": "apache-2.0", "language": ["en"]}))
    assert card.data.to_dict() == {
        "base_model": "org/base", "language": ["en"], "library_name": "transformers", "license": "apache-2.0",
        "pipeline_tag": "text-generation", "tags": ["shortstack", "pruned", "depth-pruning"],
        "base_model_relation": "finetune",
    }  # fmt: skip
    assert "# org/base@v2 without 2 of its 6 Transformer blocks\n" in card.text
    assert "[org/base](https://huggingface.co/org/base) with 2 of its 6" in card.text
    assert "800 parameters instead of 1k (20.0% fewer)" in card.text
    assert "1. pruned from 1000 to 800 parameters; chosen by: ppl, calibration text: mine.txt" in card.text
    assert "- blocks removed (numbered as in the original model): 2-3\n- blocks kept: 0-1, 4-5" in card.text
    assert "was not trained after the removal" in card.text
    assert 'AutoModelForCausalLM.from_pretrained("ORG/NAME")' in card.text
    assert "The licence of the base model, org/base: apache-2.0. Its text is in `LICENSE.txt`." in card.text
    assert "No figures were measured" in card.text


def test_steps_that_followed() -> None:
    steps = [
        *record()["steps"],
        {"stage": "retrain", "method": "lora", "steps": 5, "tokens": 60, "data": {"source": "wikitext2"}},
        {"stage": "merge"},
        {
            "stage": "quantize", "scheme": "W4A16", "method": "gptq",
            "calibration": {"samples": 8, "seq_len": 64, "source": "c4"},
        },
        {"stage": "something-new"},
    ]  # fmt: skip
    card: Any = ModelCard(model_card(record(steps=steps), {}))
    assert "blocks, retrained, quantized\n" in card.text
    assert "2. retrained (lora) for 5 steps, 60 tokens of wikitext2\n3. merged: an adapter was folded" in card.text
    assert "4. quantized to W4A16 (gptq), calibrated on 8 windows of 64 tokens of c4\n5. something-new\n" in card.text
    assert card.data.base_model_relation == "quantized"
    assert card.data.datasets == ["Salesforce/wikitext"]
    assert card.data.tags == ["shortstack", "pruned", "depth-pruning", "quantized", "w4a16", "gptq"]
    assert "compressed-tensors" in card.text
    assert "was not trained" not in card.text


def test_metadata_go_through_the_card_classes_and_the_hub_unchanged() -> None:
    text = model_card(record(), {"license": "other", "license_name": "their-own", "license_link": "LICENSE"})
    assert card_errors(text) == []
    again = str(ModelCard(text))
    assert again == text
    assert card_errors(text.replace("org/base\n", "/home/ann/base\n", 1)) != []  # the check finds what is wrong


@pytest.mark.parametrize(
    ("source", "name"),
    [("/home/ann/models/base", "base"), ("models/base", "models/base"), ("../base", "base"), ("embedded", "embedded")],
)
def test_a_folder_is_no_base_model_and_no_path_is_shown(source: str, name: str) -> None:
    made = record(source=source)
    del made["base_model"], made["revision"]
    text = model_card(made, {})
    assert "base_model" not in text
    assert f"# {name} without" in text
    assert "/home" not in text
    assert "../" not in text


@pytest.mark.fault(76)
@pytest.mark.parametrize(
    "evil", ["<script>alert(1)</script>", "a](http://evil) [b", "a|b`c`", "x\n---\nlicense: mit\n# y", "*b*"]
)
def test_names_cannot_become_markup_or_metadata(evil: str) -> None:
    steps = [
        {**record()["steps"][0], "criterion": evil},
        {"stage": evil},
        {"stage": "retrain", "method": evil, "data": {"source": evil}},
    ]
    made = record(source=evil, steps=steps, base_model=evil, files={f"LICENSE{evil}": "0"})
    text = model_card(made, {"license": evil, "language": [evil]})
    card: Any = ModelCard(text)
    assert card.data.get("base_model") is None
    assert card.data.license == evil  # as YAML quotes it
    assert not any(
        mark in card.text.replace("```python", "").replace("```", "")
        for mark in ("<script", "](http://evil", "a|b", "*b*")
    )
    assert "\n# y" not in card.text
    assert "\nlicense: mit" not in text


def test_the_base_model_of_a_record() -> None:
    assert base_model_of({"base_model": "org/base", "source": "/x"}) == "org/base"
    assert base_model_of({"source": "org/base@v2", "revision": "a" * 40}) == "org/base"  # as earlier versions wrote it
    assert base_model_of({"source": "org/base"}) == ""  # a folder can be called that
    assert base_model_of({"base_model": "../x"}) == base_model_of({"base_model": 3}) == base_model_of({}) == ""


@pytest.mark.parametrize(
    "content", ["", "no metadata", "---\n- a list\n---\n", "---\na: [\n---\n", "---\na: b\n", "---\n" + "x" * 200_000]
)
def test_cards_without_metadata_that_can_be_read(tmp_path: Path, content: str) -> None:
    (tmp_path / "README.md").write_text(content)
    assert front_matter(tmp_path / "README.md") == carried_over(tmp_path / "README.md") == {}


def test_licence_and_languages_go_from_card_to_card_and_nothing_else(copied: Built, tmp_path: Path) -> None:
    model = copied("llama")
    (model / "README.md").write_text(CARD)
    (model / "LICENSE").write_text("do as you like")
    prune(str(model), blocks="1", out=tmp_path / "p", quiet=True)
    prune(str(tmp_path / "p"), blocks="2", out=tmp_path / "q", quiet=True)
    for name in ("p", "q"):
        card = ModelCard.load(tmp_path / name / "README.md")
        assert card.data.license == "apache-2.0"
        assert card.data.language == ["en", "de"]
        assert card.data.license_link == "LICENSE"
        assert card.data.base_model is None  # the base of the base
        assert "mine" not in card.data.tags
        assert "apache-2.0. Its text is in `LICENSE`." in card.text
        assert str(tmp_path) not in str(card)


def test_a_snapshot_of_the_hub_is_known_by_its_id_however_it_is_named(built: Built, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--some--model/snapshots" / ("a" * 40)
    shutil.copytree(built("llama"), snapshot)
    prune(str(snapshot), blocks="1", out=tmp_path / "p", quiet=True)
    prune(str(tmp_path / "p"), blocks="2", out=tmp_path / "q", quiet=True)
    for name in ("p", "q"):
        card = ModelCard.load(tmp_path / name / "README.md")
        assert card.data.base_model == "some/model"
        assert str(tmp_path) not in str(card)
        made = json.loads((tmp_path / name / "shortstack.json").read_text())
        assert (made["base_model"], made["revision"]) == ("some/model", "a" * 40)
