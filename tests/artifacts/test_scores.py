"""What a person reads: rankings with bars, tables and units."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shortstack.artifacts.scores import CriterionScores, Scores
from shortstack.common.formatting import bar, count, seconds, size, table


def scores(**options: object) -> Scores:
    found = CriterionScores("ppl", (20.0, 12.0, 5000.0), (0, 1, 2), (0.1, 0.02, 0.5), base=10.0)
    return Scores("model", "f", (0, 1, 2), {"ppl": found}, {"samples": 10, "seq_len": 128, "source": "text"})


def test_ranking_reads_from_first_removed_to_last() -> None:
    lines = scores().to_text().splitlines()
    assert "lowest = least important = removed first; dense ppl 10" in lines[0]
    assert [line.split()[1] for line in lines[3:6]] == ["1", "0", "2"]
    assert "+20.0%" in lines[3]
    assert "x500" in lines[5]
    assert lines[3].count("█") < lines[4].count("█") < lines[5].count("█")
    assert all(len(line) <= 100 for line in lines)


def test_a_ranking_without_base_shows_shares() -> None:
    found = CriterionScores("taylor", (2.0, 1.0), (0, 1))
    text = Scores("model", "f", (0, 1), {"taylor": found}).to_text()
    assert "±" not in text
    assert text.splitlines()[3].count("█") < text.splitlines()[4].count("█")


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (999, "999"), (260_032, "260k"), (2_624_640, "2.62M"), (6_738_415_616, "6.74B")]
)
def test_counts(number: int, text: str) -> None:
    assert count(number) == text


@pytest.mark.parametrize(("number", "text"), [(512, "512 B"), (5_249_280, "5.25 MB"), (13_476_831_232, "13.5 GB")])
def test_sizes(number: int, text: str) -> None:
    assert size(number) == text


@pytest.mark.parametrize(("duration", "text"), [(0.4213, "0.42 s"), (37.2, "37 s"), (125.0, "2 min 5 s")])
def test_durations(duration: float, text: str) -> None:
    assert seconds(duration) == text


@given(st.floats(-1, 2), st.integers(1, 60))
def test_bars_stay_within_their_width(share: float, width: int) -> None:
    assert len(bar(share, width)) <= width


def test_tables_align() -> None:
    lines = table(["name", "value"], [["a", "1"], ["long name", "12345"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2].endswith(" 1")
