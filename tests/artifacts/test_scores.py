"""What a person reads: rankings with bars, tables and units."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shortstack.artifacts.ranking_text import ranking_table
from shortstack.artifacts.scores import CriterionScores, Scores, load_scores
from shortstack.artifacts.scores_csv import write_scores_csv
from shortstack.baselines.orders import open_scores
from shortstack.common.formatting import bar, count, seconds, size, table
from shortstack.errors import ShortstackError


def scores(**options: object) -> Scores:
    found = CriterionScores("ppl", (20.0, 12.0, 5000.0), (0, 1, 2), (0.1, 0.02, 0.5), dense_ppl=10.0)
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


def bare(folder: Path, text: str = "3,1,2,0") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "block_order.csv").write_text(text + "\n")
    return folder / "block_order.csv"


def test_a_bare_order_is_shown_and_written(tmp_path: Path) -> None:
    """It has no scores: nothing is made up, and nothing raises."""
    found = load_scores(bare(tmp_path))
    text = found.to_text()
    assert "3, 1, 2, 0" in text
    assert "None" not in text
    found.save(tmp_path / "scores.json")
    record = json.loads((tmp_path / "scores.json").read_text())
    assert record["criteria"]["block_order.csv"]["scores"] == [None] * 4
    back = load_scores(tmp_path / "scores.json")
    assert back.criterion().order == (3, 1, 2, 0)
    assert back.criterion().by_block() is None
    write_scores_csv(found, tmp_path / "csv", [1, 2, 3, 4])
    assert next((tmp_path / "csv").glob("*/block_order.csv")).read_text() == "3,1,2,0\n"


def test_a_criterion_that_is_given_names_a_bare_order(tmp_path: Path) -> None:
    assert load_scores(bare(tmp_path)).criterion("taylor").name == "taylor"
    lying = load_scores(bare(tmp_path / "ppl_n10"))
    assert lying.criterion("ppl").name == "ppl"
    with pytest.raises(ShortstackError, match="an order by ppl.*criterion='taylor' contradicts it"):
        lying.criterion("taylor")
    with_parameters = load_scores(bare(tmp_path / "taylor-p-2_n10"))
    assert with_parameters.criterion("taylor:p=2").name == "taylor:p=2"


@pytest.mark.parametrize("folder", ["exp_n5", "taylored_n5", "my-ppl_n10", "run_n2"])
def test_a_folder_that_only_looks_published_contradicts_nothing(tmp_path: Path, folder: str) -> None:
    assert load_scores(bare(tmp_path / folder)).criterion("taylor").name == "taylor"


@pytest.mark.parametrize("table", ["block_score_sorted.csv", "all_exp_sorted.csv"])
def test_a_folder_with_the_published_tables_says_what_its_order_is_by(tmp_path: Path, table: str) -> None:
    found = load_scores(bare(tmp_path / "exp_n5"))
    (tmp_path / "exp_n5" / table).touch()
    assert found.criterion("exp").name == "exp"
    with pytest.raises(ShortstackError, match="an order by exp.*criterion='taylor' contradicts it"):
        found.criterion("taylor")


def test_a_criterion_that_a_published_order_is_not_by_is_refused() -> None:
    found = open_scores("published:vicuna-7b-v1.3:ppl")
    assert found.criterion("ppl").name == "ppl"
    with pytest.raises(ShortstackError, match="the scores hold ppl, not taylor"):
        found.criterion("taylor")


@pytest.mark.fault(111)
@pytest.mark.parametrize("values", [(math.inf, 2.0, 3.0), (math.inf, math.inf, 3.0), (math.inf,) * 3])
def test_infinite_scores_are_removed_last_and_shown(values: tuple[float, ...], tmp_path: Path) -> None:
    found = Scores("m", "f", (0, 1, 2), {"ppl": CriterionScores("ppl", values, (0, 1, 2), dense_ppl=1.5)})
    assert "inf" in found.to_text()
    found.save(tmp_path / "s.json")
    back = load_scores(tmp_path / "s.json").criterion()
    assert back.scores == values
    assert back.order == found.criterion().order
    text = (tmp_path / "s.json").read_text().replace('"Infinity"', '"NaN"')
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(ShortstackError, match="not a number"):
        load_scores(tmp_path / "s.json")


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


@pytest.mark.fault(117)
@pytest.mark.parametrize(
    ("entry", "value", "says"),
    [
        ("stderr", [0.1, None, 0.5], "ppl has 2 standard errors for 3 scores"),
        ("base", 0.0, "ppl holds a perplexity that is not above 0"),
        ("scores", [20.0, -1.0, 5000.0], "ppl holds a perplexity that is not above 0"),
    ],
)
def test_scores_that_no_ranking_could_show_are_refused(tmp_path: Path, entry: str, value: object, says: str) -> None:
    record = scores().to_json()
    record["criteria"]["ppl"][entry] = value
    (tmp_path / "scores.json").write_text(json.dumps(record))
    with pytest.raises(ShortstackError, match=says):
        load_scores(tmp_path / "scores.json")


def test_errors_are_named_in_the_unit_of_the_scores() -> None:
    """Those of perplexities are of the NLL; other criteria's are of the score itself."""
    ppl = CriterionScores("ppl", (12.0, 11.0), (0, 1), (0.1, 0.1), 10.0)
    kl = CriterionScores("kl", (0.2, 0.1), (0, 1), (0.01, 0.01))
    assert "s.e. (NLL)" in ranking_table(ppl).head
    assert "s.e." in ranking_table(kl).head
    assert not any("NLL" in cell for cell in ranking_table(kl).head)
