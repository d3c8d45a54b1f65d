"""What `shortstack families` shows: all in 80 columns, one with its reasons, those of a status."""

from __future__ import annotations

import pytest

from shortstack.cli.app import run
from shortstack.errors import ShortstackError
from shortstack.inspection.families import families


def test_all_fit_into_eighty_columns() -> None:
    shown = families().to_text()
    assert max(map(len, shown.splitlines())) <= 80
    assert len(shown.splitlines()) > 130


def test_one_family_is_shown_with_its_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["families", "gemma3n_text"]) == 0
    shown = capsys.readouterr().out
    assert "block 4 uses the keys and values of block 1" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_a_part_of_a_name_and_a_status() -> None:
    assert {facts.family for facts in families("gemma3_").families} == {"gemma3_text"}
    refused = families(status="refused")
    assert refused.families
    assert all(facts.status == "refused" for facts in refused.families)
    assert {facts.status for facts in families(status="partly").families} == {"exact but for some sets"}
    assert families("llama").families[0].family == "llama"


def test_a_name_that_is_not_in_the_table() -> None:
    with pytest.raises(ShortstackError, match="lama3x: not in the table of families"):
        families("lama3x")
