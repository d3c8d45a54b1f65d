"""A table is the same cells as text, whoever shows it."""

from __future__ import annotations

from shortstack.artifacts.ranking_text import Scale, ranking_table, ranking_text
from shortstack.artifacts.scores import CriterionScores
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
