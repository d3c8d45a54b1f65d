"""A table is the same cells as text, whoever shows it."""

from __future__ import annotations

from dataclasses import replace

from shortstack.artifacts.ranking_text import Scale, ranking_table, ranking_text
from shortstack.artifacts.scores import CriterionScores, Scores
from shortstack.common.formatting import legend, short_names, wrapped
from shortstack.common.tables import Table


def test_text_has_title_cells_and_notes_in_order() -> None:
    shown = Table(["", "ppl"], [["dense", "5.1"], ["pruned", "12.25"]], "on a text", ["lower is better"]).to_text()
    assert shown.splitlines() == [
        "on a text",
        "          ppl",
        "------  -----",
        "dense     5.1",
        "pruned  12.25",
        "lower is better",
    ]


def test_a_ranking_is_one_table_with_and_without_bars() -> None:
    found = CriterionScores("ppl", (9.0, 6.0, 30.0), (0, 1, 2), (0.1, 0.2, 0.3), 5.0)
    table, lines = ranking_table(found), ranking_text(found).splitlines()
    assert [row[1] for row in table.rows] == ["1", "0", "2"]
    assert lines[0] == table.title
    for row, line in zip(table.rows, lines[3:], strict=True):
        assert line.split()[: len(row)] == [cell.strip() for cell in row]


def test_a_bare_order_has_ranks_alone() -> None:
    table = ranking_table(CriterionScores("order", (), (0, 1), known_order=(1, 0)))
    assert (list(table.head), [list(row) for row in table.rows]) == (["rank", "block"], [["   1", "1"], ["   2", "0"]])


def test_the_scale_cuts_what_is_far_above_the_others_and_takes_errors() -> None:
    found = CriterionScores("ppl", (6.0, 6.1, 6.2, 50000.0), (0, 1, 2, 3), None, 5.0)
    scale = Scale.of(found)
    assert scale.share(6.2) < 1 < scale.share(50000.0)
    assert scale.share(6.0, -0.1) < scale.share(6.0) < scale.share(6.0, 0.1)
    assert scale.share(5.0, -0.1) == 0


def test_a_ranking_marks_the_blocks_that_stay() -> None:
    """Block 0 was shown as the one that is removed first, although `plan` keeps it."""
    blocks = tuple(range(12))
    scores = Scores("m", None, blocks, {"magnitude": CriterionScores("magnitude", tuple(map(float, blocks)), blocks)})
    lines = scores.to_text().splitlines()
    marks = [line.split()[0] + line.split()[1] for line in lines[3:9]]
    assert marks == ["+0", "+1", "+2", "+3", "14", "25"]
    assert "+ stays by default: the first four and the last two blocks, as published" in lines
    none = {"source": "none", "samples": 0, "seq_len": 0}
    assert replace(scores, calibration=none).to_text().endswith("m: from the weights alone")
    few = Scores("m", None, (0, 1), {"magnitude": CriterionScores("magnitude", (1.0, 2.0), (0, 1))})
    assert "+" not in few.to_text()


def test_what_is_too_wide_stands_below() -> None:
    head = ["model", *(f"figure {number}" for number in range(10))]
    shown = Table(head, [["pruned", *"0123456789"], ["dense", *"abcdefghij"]]).to_text()
    assert max(map(len, shown.splitlines())) <= 80
    first, second = shown.split("\n\n")
    assert first.splitlines()[2].split() == ["pruned", *"0123456"]
    assert second.splitlines()[0].split()[0] == "model"
    assert second.splitlines()[3].split() == ["dense", *"hij"]


def test_models_have_short_names_and_a_legend() -> None:
    names = ["/a/b/c/pruned", "/a/d/c/pruned", "org/model", "embedded"]
    assert short_names(names) == ["b/c/pruned", "d/c/pruned", "org/model", "embedded"]
    assert short_names(["/a/b/dense", "/a/b/pruned"]) == ["dense", "pruned"]
    assert short_names(["x", "x"]) == ["x", "x"]
    assert short_names([]) == []
    assert legend(["/a/b/dense", "embedded"]) == ["dense: /a/b/dense"]


def test_texts_beside_names_are_wrapped() -> None:
    shown = wrapped([("a", "word " * 40), ("longer", "short")])
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.splitlines()[-1] == "longer  short"


def test_every_part_of_a_wide_table_says_which_row_it_is() -> None:
    """Rows of one model at two batch sizes looked alike in the parts below the first."""
    head = ["model", "batch", *(f"figure {number}" for number in range(10))]
    shown = Table(head, [["pruned", "1", *"0123456789"], ["pruned", "8", *"abcdefghij"]], keys=2).to_text()
    assert max(map(len, shown.splitlines())) <= 80
    parts = shown.split("\n\n")
    assert len(parts) > 1
    assert [[line.split()[:2] for line in part.splitlines()[2:]] for part in parts] == [
        [["pruned", "1"], ["pruned", "8"]]
    ] * len(parts)
    assert "".join(line.split()[2] for line in parts[-1].splitlines()[2:]) == "6g"
