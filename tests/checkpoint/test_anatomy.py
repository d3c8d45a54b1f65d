"""The rules of the table against transformers' own configs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoConfig

from shortstack.checkpoint.anatomy import FAMILIES, is_tied, per_block_lists, ranges, shortened_config
from shortstack.checkpoint.reader import open_checkpoint
from tests import pico

RULES = [name for name, family in FAMILIES.items() if family.implied is not None]


@pytest.mark.parametrize("depth", [1, 2, 5, 6, 13, 30])
@pytest.mark.parametrize(
    "settings", [{}, {"use_sliding_window": True, "max_window_layers": 3, "sliding_window_pattern": 4}]
)
@pytest.mark.parametrize("family", RULES)
def test_implied_lists_are_what_autoconfig_expands(family: str, settings: dict[str, object], depth: int) -> None:
    config = {"model_type": family, "num_hidden_layers": depth, **settings}
    expected = AutoConfig.for_model(family, **{key: value for key, value in config.items() if key != "model_type"})
    assert per_block_lists(config, FAMILIES[family], depth, "here")["layer_types"] == expected.layer_types


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_tied_by_default_is_what_the_config_class_says(family: str) -> None:
    assert is_tied({}, FAMILIES[family]) == AutoConfig.for_model(family).tie_word_embeddings


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_rows_fit_the_models(built: Callable[..., Path], family: str) -> None:
    """Every row of the table: its count entry, prefix, embedding and head are those of a checkpoint that is saved."""
    checkpoint = open_checkpoint(built(family))
    assert checkpoint.depth == 6
    assert checkpoint.parameters() == sum(p.numel() for p in pico.load(checkpoint.directory).parameters())


def test_nothing_removed_changes_nothing(built: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(built("qwen2"))
    assert shortened_config(checkpoint.config, checkpoint.anatomy, range(6), "here") == checkpoint.config


def test_ranges() -> None:
    assert ranges([9, 0, 1, 2, 3, 7, 10]) == "0-3, 7, 9-10"
    assert ranges([]) == ""
