"""Pieces of the page: whatever a name holds, it is shown and not run; what a picture shows is said in words too."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from shortstack.demo import markup
from shortstack.demo.writing import Column, Writing
from shortstack.evaluation.options import EvaluationOptions

MARKUP = '<script>alert(1)</script>"><img src=x onerror=alert(1)>'


@pytest.mark.fault(83)
def test_names_errors_and_labels_are_escaped(built: Callable[..., Path], tmp_path: Path) -> None:
    options = EvaluationOptions(quiet=True)
    pieces = [
        markup.head(Column(MARKUP, str(built("llama")), options), 0),
        markup.head(Column(MARKUP, str(tmp_path / MARKUP.replace("/", "")), options), 1),
        markup.failure(MARKUP),
        markup.chart([{"name": MARKUP, "asked": MARKUP, "column": 0, "rate": 2.0}]),
        markup.bars([1.0, 2.0], {0}, [0, 1], MARKUP),
    ]
    for piece in pieces:
        assert "<script" not in piece
        assert "<img" not in piece
        assert "&lt;script&gt;" in piece


def test_a_strip_is_said_in_words() -> None:
    assert 'aria-label="blocks 0, 2-3 of 0-3 are here"' in markup.strip((0, 2, 3), 4)
    assert 'aria-label="all 4 blocks are here"' in markup.strip((0, 1, 2, 3), 4)
    assert markup.strip((0, 2, 3), 4).count('class="gone"') == 1


def test_scores_of_very_different_sizes_are_shown_by_logarithms() -> None:
    even, wide = markup.bars([1.0, 2.0, 4.0], set(), [0, 1, 2], "x"), markup.bars([1e6, 2.0, 4.0], {1}, [0, 1, 2], "x")
    assert 'style="height:25.0%"' in even
    assert "logarithms" not in even
    assert "by their logarithms; removed: 1" in wide
    assert 'style="height:100.0%"' in wide
    assert 'style="height:100.0%" title="block 1: inf"' in markup.bars([1.0, math.inf], set(), [0, 1], "x")


def test_measures_name_what_they_measure() -> None:
    said = markup.measures(Writing(["a"], 10, 2.0, 0.5, 3_000_000, stopped=True))
    for part in (
        "2.00 s",
        "first token after 0.50 s",
        "10 tokens",
        "5.0 tokens/s",
        "peak memory of the process 3",
        "stopped",
    ):
        assert part in said
