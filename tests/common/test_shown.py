"""Results in Python: printed they are the table, their repr is short, and notebooks show a table."""

from __future__ import annotations

import importlib
import inspect
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shortstack
from shortstack.artifacts.scores import CriterionScores, Scores
from shortstack.common.shown import Shown
from shortstack.registry import COMMANDS

Built = Callable[..., Path]
SCORES = Scores(
    "a<b", "f" * 64, (0, 1, 2), {"ppl": CriterionScores("ppl", (3.0, 1.0, 2.0), (0, 1, 2), (0.1, 0.2, 0.3))}
)


def test_printed_it_is_the_text() -> None:
    assert str(SCORES) == SCORES.to_text()
    assert f"{SCORES}" == SCORES.to_text()


def test_the_repr_is_short() -> None:
    many = tuple(range(500))
    big = Scores("x" * 5000, "f" * 64, many, {f"c{n}": CriterionScores(f"c{n}", (0.5,) * 500, many) for n in range(9)})
    assert repr(big).startswith("Scores(source='xxx")
    assert len(repr(big)) <= 320
    assert "\n" not in repr(big)


def test_a_notebook_shows_a_table() -> None:
    shown = SCORES._repr_html_()
    assert shown.startswith("<table>")
    assert shown.count("<tr>") == 4
    assert "<td>ppl</td><td>1</td><td>1</td><td>1</td><td>0.2</td>" in shown
    plain = Described()._repr_html_()
    assert plain == "<pre>a &lt; b</pre>"


class Described(Shown):
    def to_text(self) -> str:
        return "a < b"

    def to_json(self) -> Any:
        return {"schema": 1}


def test_pandas_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = types.ModuleType("pandas")
    frame.DataFrame = lambda rows: rows  # type: ignore[attr-defined]
    frame.__spec__ = importlib.machinery.ModuleSpec("pandas", None)
    monkeypatch.setitem(sys.modules, "pandas", frame)
    assert SCORES.to_pandas()[0] == {"criterion": "ppl", "rank": 1, "block": 1, "score": 1.0, "stderr": 0.2}
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(shortstack.UsageError, match="to_pandas needs pandas"):
        SCORES.to_pandas()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_returns_what_can_be_shown(name: str) -> None:
    """CONTRIBUTING.md: a stage returns a record that extends `Shown`, with a short repr."""
    function = inspect.unwrap(COMMANDS[name].stage)
    returned = typing.get_type_hints(function)["return"]
    for kind in typing.get_args(returned) or (returned,):
        if kind is type(None):
            continue
        assert issubclass(kind, Shown), f"{name} returns {kind.__name__}, which does not extend Shown (common/shown.py)"
        assert kind.__repr__ is Shown.__repr__, f"{kind.__name__}: @dataclass(frozen=True, repr=False)"
        assert kind.to_text is not Shown.to_text, f"{kind.__name__} has no to_text"
        assert kind.to_json is not Shown.to_json, f"{kind.__name__} has no to_json"


def test_what_python_users_write(built: Built, tmp_path: Path) -> None:
    """Lists, numbers and paths as they come to hand."""
    model = Path(str(built("llama")))
    text = tmp_path / "text.txt"
    text.write_text("a text that is long enough for some windows. " * 60)
    scores = shortstack.score(model, criterion=["magnitude", "magnitude:block=mean"], quiet=True)
    assert len(scores.criteria) == 2
    assert len(scores.table_rows()) == 12
    plan = shortstack.plan(model, blocks=[1, 2])
    assert plan.removed == (1, 2)
    assert [row["block"] for row in plan.table_rows() if row["removed"]] == [1, 2]
    pruned = shortstack.prune(model, plan=plan, out=str(tmp_path / "p"), quiet=True)
    results = shortstack.evaluate(model, pruned.out, data=[text], seq_len=32, device="cpu", quiet=True)
    assert {row["model"] for row in results.table_rows()} == {str(model), str(pruned.out)}
    compared = shortstack.compare(results)
    assert compared.table_rows()
    assert str(compared) == compared.to_text()
    assert len(repr(results)) <= 320
