"""`curve` shows what ever more blocks cost, on windows that chose nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import shortstack
from shortstack.artifacts.curve import Curve, CurvePoint, bend
from shortstack.common import pictures
from shortstack.errors import ShortstackError, UsageError
from shortstack.pruning import curve_plot
from tests import oracle, pico

Built = Callable[..., Path]
WINDOWS = pico.windows(6)
JUDGING = WINDOWS[3:]


def drawn(model: Path, folder: Path, **options: Any) -> Any:
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"input_ids": window}) + "\n" for window in WINDOWS))
    return shortstack.curve(str(model), data=str(rows), samples=3, seq_len=16, quiet=True, **options)


@pytest.mark.parametrize("selection", ["greedy", "beam:2", "one-shot", "contiguous"])
def test_each_point_is_what_search_chooses(built: Built, tmp_path: Path, selection: str) -> None:
    model = built("llama")
    found = drawn(model, tmp_path, selection=selection, most=3)
    assert [len(point.removed) for point in found.points] == [1, 2, 3]
    for size, point in enumerate(found.points, start=1):
        one = shortstack.search(
            str(model),
            data=str(tmp_path / "rows.jsonl"),
            samples=3,
            seq_len=16,
            quiet=True,
            selection=selection,
            remove=size,
        )
        assert point.removed == one.removed
        assert point.increase == pytest.approx(one.why["measured"]["sets"][0]["increase"], rel=1e-5)
        assert point.parameters == one.after["parameters"]


@torch.no_grad()
def test_figures_are_those_of_the_other_windows(built: Built, tmp_path: Path) -> None:
    model = built("llama")
    found = drawn(model, tmp_path, most=2)
    dense = oracle.mean_nll(pico.load(model), JUDGING)
    assert found.dense_ppl == pytest.approx(math.exp(dense.mean()), rel=1e-5)
    for point in found.points:
        nll = oracle.mean_nll(oracle.bypassed(pico.load(model), set(point.removed)), JUDGING)
        assert point.ppl == pytest.approx(math.exp(nll.mean()), rel=1e-5)
        assert point.increase == pytest.approx(math.expm1((nll - dense).mean()), rel=1e-3, abs=1e-6)
    pairs = [window[place : place + 2] for window in JUDGING for place in range(0, 16, 2)]
    one_token = math.exp(oracle.mean_nll(pico.load(model), pairs).mean())
    assert found.one_token_ppl == pytest.approx(one_token, rel=1e-5)


def test_it_is_written_and_half_of_the_blocks_is_the_default(built: Built, tmp_path: Path) -> None:
    found = drawn(built("llama"), tmp_path, out=tmp_path / "curve.json")
    assert len(found.points) == 3
    assert json.loads((tmp_path / "curve.json").read_text()) == found.to_json()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["curve.json", "rows.jsonl"]
    assert len(found.table_rows()) == 3
    assert max(map(len, found.to_text().splitlines())) <= 110


def made(*ppl: float, one_token: float = 100.0) -> Curve:
    points = tuple(
        CurvePoint(tuple(range(number)), 100 - number, value, value / 10 - 1, 0.01)
        for number, value in enumerate(ppl, start=1)
    )
    return Curve("m", "f", "greedy", 10.0, one_token, points)


def test_knee_and_point_of_no_return() -> None:
    found = made(10.5, 11.0, 11.6, 30.0, 90.0, 270.0)
    assert found.knee == 3
    assert found.point_of_no_return == 6
    text = found.to_text()
    marked = {line.split()[0]: line for line in text.splitlines()[3:10]}
    assert "knee" in marked["3"]
    assert "no return" in marked["6"]
    assert made(11.0, 12.0).point_of_no_return is None
    assert made(math.inf, math.inf).point_of_no_return == 1
    assert made(math.inf, math.inf).knee is None


def test_sizes_that_no_set_has_are_not_counted() -> None:
    """A family whose blocks go by twos: the numbers are those of blocks, not of points."""
    ppl = {2: 10.5, 4: 11.0, 6: 30.0}
    points = tuple(CurvePoint(tuple(range(n)), 100, value, value / 10.0 - 1, None) for n, value in ppl.items())
    found = Curve("m", "f", "greedy", 10.0, 20.0, points)
    assert (found.knee, found.point_of_no_return) == (4, 6)
    assert [row["blocks removed"] for row in found.table_rows()] == [2, 4, 6]
    lines = {line.split()[0]: line for line in found.to_text().splitlines()[3:7]}
    assert list(lines) == ["0", "2", "4", "6"]
    assert "knee" in lines["4"]
    assert "no return" in lines["6"]
    assert "+10.0%" in lines["4"]


def test_the_picture_has_the_figures_and_the_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, drawn_axes = made(10.5, 11.0, 11.6, 30.0, 90.0, 270.0), []
    real = pictures.drawing

    def drawing(*given: Any, **options: Any) -> Any:
        figure, axes = real(*given, **options)
        drawn_axes.append(axes)
        return figure, axes

    monkeypatch.setattr(curve_plot, "drawing", drawing)
    curve_plot.write_curve(found, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = drawn_axes
    labels = axes.get_legend_handles_labels()[1]
    assert set(labels) == {
        "all text", "knee: 3 blocks", "point of no return: 6 blocks", "dense model that sees one token",
    }  # fmt: skip
    upright = {line.get_label(): line.get_xdata()[0] for line in axes.lines if len(set(line.get_xdata())) == 1}
    assert upright == {"knee: 3 blocks": 3, "point of no return: 6 blocks": 6}
    assert [tick.get_text() for tick in axes.get_yticklabels()][:4] == ["1", "2", "5", "10"]


def test_the_picture_has_each_source_and_ends_where_figures_do() -> None:
    sources: dict[str, dict[str, float | None]] = {
        "books": {"ppl": 11.0, "increase": 0.1, "stderr": 0.02},
        "sums": {"ppl": 5.0, "increase": 1.0, "stderr": None},
    }
    points = (
        CurvePoint((1,), 9, 12.0, 0.2, 0.01, sources),
        CurvePoint((1, 2), 8, math.inf, math.inf, None, {**sources, "sums": {"ppl": math.inf, "increase": math.inf}}),
    )  # fmt: skip
    drawn_lines = curve_plot.lines(Curve("m", "f", "greedy", 10.0, 100.0, points))
    assert drawn_lines == {
        "all text": [(0, 1.0, 0.0), (1, 1.2, 0.01)],
        "books": [(0, 1.0, 0.0), (1, 1.1, 0.02), (2, 1.1, 0.02)],
        "sums": [(0, 1.0, 0.0), (1, 2.0, 0.0)],
    }


def test_a_picture_is_drawn_beside_the_record(built: Built, tmp_path: Path) -> None:
    drawn(built("llama"), tmp_path, most=2, out=tmp_path / "curve.json", plot=tmp_path / "curve.png")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["curve.json", "curve.png", "rows.jsonl"]


def test_a_straight_or_bulging_curve_has_no_knee() -> None:
    assert bend([0.0, 1.0, 2.0, 3.0]) is None
    assert bend([0.0, 3.0, 4.0, 4.5]) is None
    assert bend([0.0, 1.0]) is None
    assert bend([0.0, 0.1, 0.2, 3.0]) == 2


def test_what_cannot_be_asked(built: Built, tmp_path: Path) -> None:
    for selection in ("evolution", "swaps"):
        with pytest.raises(UsageError, match=f"selection='{selection}': searches sets of one size only"):
            drawn(built("llama"), tmp_path, selection=selection)
    with pytest.raises(UsageError, match="most=6: expected 1 to 5"):
        drawn(built("llama"), tmp_path, most=6)
    with pytest.raises(ShortstackError, match="none of its 1 block is removable"):
        drawn(built("llama", num_hidden_layers=1), tmp_path)
