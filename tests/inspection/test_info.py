"""`shortstack info`: whether blocks can be removed exactly stands beside what the checkpoint is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shortstack.cli.app import run
from shortstack.inspection.info import info
from tests import pico


def line(text: str) -> str:
    return next(one for one in text.splitlines() if one.strip().startswith("removed exactly"))


def test_any_block_of_most_families_can_go(tmp_path: Path) -> None:
    for family in ("llama", "gpt2"):  # the second has a rule, which this config does not meet
        found = info(str(pico.build(tmp_path / family, family)))
        assert (found.not_removable, found.some_sets_refused) == ({}, False)
        assert line(found.to_text()).split() == ["removed", "exactly", "any", "block"]


def test_blocks_that_must_stay_are_named_with_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = pico.build(tmp_path / "m", "gpt2", scale_attn_by_inverse_layer_idx=True)
    found = info(str(model))
    assert list(found.not_removable) == [0, 1, 2, 3, 4]
    assert "block 5; " in line(found.to_text())
    assert "only the last blocks can be removed" in line(found.to_text())
    assert run(["info", str(model), "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["not_removable"]) == set("01234")


def test_sets_that_are_refused_are_told_of(tmp_path: Path) -> None:
    kinds = ["full_attention", "conv", "conv", "full_attention", "conv", "conv"]
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 260,
    }
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "lfm2", num_hidden_layers=6, layer_types=kinds, block_auto_adjust_ff_dim=False, **sizes
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    found = info(str(tmp_path / "m"))
    assert (found.not_removable, found.some_sets_refused) == ({}, True)
    assert "any block; some sets of blocks are refused" in line(found.to_text())
