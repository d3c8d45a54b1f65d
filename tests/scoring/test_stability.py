"""`stability` says how far rankings agree where one thing is varied."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import shortstack
from shortstack.errors import ShortstackError, UsageError
from shortstack.runtime import devices
from shortstack.scoring import stability as stage
from shortstack.scoring.stability_plot import shares
from tests import pico

Built = Callable[..., Path]


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "text.jsonl"
    path.write_text(
        "".join(json.dumps({"text": chr(97 + number) * 40 + "the model " * 9}) + "\n" for number in range(12))
    )
    return str(path)


def found(model: Path, data: str, **options: Any) -> Any:
    given = {"data": data, "samples": 4, "seq_len": 16, "seed": 7, "remove": 2, "quiet": True, **options}
    return shortstack.stability(str(model), **{"criterion": "ppl,bi", "seeds": 2, "windows": "2", **given})


def scored(model: Path, data: str, criterion: str, **options: Any) -> tuple[int, ...]:
    scores = shortstack.score(str(model), criterion=criterion, data=data, seq_len=16, quiet=True, **options)
    return tuple(scores.criterion(criterion).order)


def test_rankings_are_those_of_score_and_agree_as_agree_says(built: Built, data: str) -> None:
    model, made = built("llama"), found(built("llama"), data)
    orders = {(one.criterion, one.seed, one.windows): one.order for one in made.rankings}
    assert set(orders) == {(c, s, w) for c in ("ppl", "bi") for s, w in ((7, 4), (7, 2), (8, 4))}
    for seed in (7, 8):
        assert orders["ppl", seed, 4] == scored(model, data, "ppl", samples=4, seed=seed)
        assert orders["bi", seed, 4] == scored(model, data, "bi", samples=4, seed=seed)
    pairs = {(what, first.name, second.name): one for what, first, second, one in made.varied}
    assert [what for what, *_ in pairs] == ["criterion", "seed", "seed", "windows", "windows"]
    for (what, *_), one in zip(pairs, (a for *_, a in made.varied), strict=True):
        first, second = (next(r for r in made.rankings if r.name == name) for name in (one.first, one.second))
        same = set(first.order[:2]) & set(second.order[:2])
        assert set(one.chosen[2][0]) == same
        assert getattr(first, what) != getattr(second, what)
    both = shortstack.score(str(model), criterion="ppl,bi", data=data, samples=4, seq_len=16, seed=7, quiet=True)
    agreed = shortstack.agree(both, remove=2).pairs[0]
    assert made.varied[0][3].tau == pytest.approx(agreed.tau)


def test_the_record_the_table_and_the_map(built: Built, data: str, tmp_path: Path) -> None:
    made = found(built("llama"), data, out=tmp_path / "s.json", plot=tmp_path / "s.png")
    record = json.loads((tmp_path / "s.json").read_text())
    assert record == json.loads(json.dumps(made.to_json()))
    assert len(record["rankings"]) == 6
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    values = shares(made)
    assert all(values[place][place] == 1 for place in range(6))
    assert values == [list(column) for column in zip(*values, strict=True)]
    assert "same blocks" in made.to_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.json", "s.png", "text.jsonl"]


@pytest.fixture
def sources(tmp_path: Path) -> str:
    names = []
    for name, seed in (("general", 1), ("sums", 2)):
        rows = tmp_path / f"{name}.jsonl"
        rows.write_text("".join(json.dumps({"input_ids": one}) + "\n" for one in pico.windows(4, 16, seed=seed)))
        names.append(f"{name}={rows}")
    return ",".join(names)


@pytest.mark.fault(151)
def test_named_sources_are_compared(built: Built, sources: str, tmp_path: Path) -> None:
    """Each ranks the blocks as it does alone; all other comparisons are of the text of all of them."""
    model, one_by_one = built("llama"), dict(part.split("=") for part in sources.split(","))
    made = found(model, sources, out=tmp_path / "s.json", criterion="ppl,bi,magnitude", seeds=1)
    orders = {(one.criterion, one.windows, one.source): one.order for one in made.rankings}
    assert set(orders) == {
        *((criterion, size, None) for criterion in ("ppl", "bi", "magnitude") for size in (2, 4)),
        *((criterion, 4, name) for criterion in ("ppl", "bi") for name in ("general", "sums")),
    }
    for (criterion, size, name), order in orders.items():
        data = sources if name is None else one_by_one[name]
        assert order == scored(model, data, criterion, samples=size)
    compared = [(what, first, second) for what, first, second, _ in made.varied]
    assert [what for what, *_ in compared].count("source") == 2
    for what, first, second in compared:
        assert (first.source is None) == (second.source is None) == (what != "source")
    rows = [row for row in made.table_rows() if row["varied"] == "source"]
    assert [(row["criterion"], row["first"], row["second"]) for row in rows] == [
        ("ppl", "general", "sums"), ("bi", "general", "sums"),
    ]  # fmt: skip
    assert "general and sums" in made.to_text()
    assert (
        found(model, sources, out=tmp_path / "s.json", criterion="ppl,bi,magnitude", seeds=1).to_json()
        == made.to_json()
    )


def test_killed_it_resumes(built: Built, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, real, calls = found(built("llama"), data), stage.score_windows, []

    def score(*given: Any, **options: Any) -> Any:
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*given, **options)

    monkeypatch.setattr(stage, "score_windows", score)
    with pytest.raises(KeyboardInterrupt):
        found(built("llama"), data, out=tmp_path / "s.json")
    assert found(built("llama"), data, out=tmp_path / "s.json").to_json() == whole.to_json()
    assert len(calls) == 4  # the third run alone is made again


def test_lines_about_the_run_are_said_once(
    built: Built, data: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not once for every seed and number of windows."""
    monkeypatch.setattr(devices, "bfloat16_units", lambda: "some units")
    found(built("llama", dtype=torch.bfloat16), data, dtype="auto", quiet=False, seeds=3)
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if "some units" in line]) == 1
    assert len(lines) == len(set(lines))


def test_protected_blocks_are_left_out(built: Built, data: str) -> None:
    made = found(built("llama", num_hidden_layers=12), data, seeds=1)
    assert made.protected == (0, 1, 2, 3, 10, 11)
    assert all(block in range(4, 10) for *_, one in made.varied for part in one.chosen[2] for block in part)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"remove": 7}, "expected 1 to 6 blocks"),
        ({"seeds": 0}, "expected at least 1"),
        ({"windows": "2,x"}, "expected numbers of windows"),
        ({"windows": "0"}, "expected numbers of windows"),
        ({"criterion": "pl"}, "unknown criterion"),
        ({"samples": 5000, "windows": "2"}, "too little|needs|needed|windows"),
    ],
)
def test_bad_input(built: Built, data: str, given: dict[str, Any], says: str) -> None:
    with pytest.raises((UsageError, ShortstackError), match=says):
        found(built("llama"), data, **given)
