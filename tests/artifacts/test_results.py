"""Figures that are infinite, or cannot be had, stay what they are: in files, means, tables and comparisons."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from shortstack.artifacts.results import (
    Figure,
    Result,
    Results,
    load_results,
    mean_figure,
    mean_of,
    perplexity,
    perplexity_figure,
    shown_figure,
)
from shortstack.errors import ShortstackError


def result(model: str, figure: Figure, nll: list[float] | None = None) -> Result:
    data = {"source": "text", "sha256": "s", "rows": 2}
    per_item = {"ppl_128": nll} if nll else {}
    return Result(model, model, "ppl", data, {}, {"ppl_128": figure}, 10, 10, 1.0, 1, per_item=per_item)


def test_perplexity_of_any_loss() -> None:
    assert perplexity(2.0) == math.exp(2.0)
    assert perplexity(705.0) == math.exp(705.0)
    assert perplexity(710.0) == math.inf
    assert math.isnan(perplexity(math.nan))


@pytest.mark.fault(111)
def test_an_infinite_perplexity_is_valid_json_and_comes_back_infinite(tmp_path: Path) -> None:
    figure = perplexity_figure([800.0, 900.0], 127)
    assert figure.value == math.inf
    assert figure.stderr is None
    assert "mean NLL is 850" in figure.note
    Results((result("m", figure),)).save(tmp_path / "r.json")
    record = json.loads((tmp_path / "r.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert record["figures"]["ppl_128"]["value"] is None
    assert record["not_finite"] == {"/figures/ppl_128/value": "Infinity"}
    (back,) = load_results(tmp_path / "r.json").results
    assert back.figures["ppl_128"] == figure
    assert "inf" in load_results(tmp_path / "r.json").to_text()
    assert shown_figure(figure) == "inf"


def test_a_mean_of_figures_that_are_not_there_is_not_there() -> None:
    there = Figure(0.5, 0.1, "accuracy", 10)
    missing = Figure(None, None, "accuracy", 0, "no rows")
    assert mean_of({"a": there, "b": there}) == Figure(0.5, pytest.approx(math.sqrt(0.02) / 2), "accuracy", 20)
    mean = mean_of({"a": there, "b": missing})
    assert mean.value is None
    assert mean.note == "no figure of b"
    assert mean_of({}).value is None


def test_an_unknown_error_of_one_figure_is_an_unknown_error_of_the_mean() -> None:
    assert mean_of({"a": Figure(0.5, None, "accuracy", 10), "b": Figure(0.3, 0.1, "accuracy", 10)}).stderr is None
    assert mean_figure([], "accuracy").value is None


@pytest.mark.fault(117)
@pytest.mark.parametrize(
    ("entry", "value", "says"),
    [
        ("per_item", {"ppl_128": ["2.0"]}, "per_item of ppl_128 holds something other than measures"),
        ("per_item", {"ppl_128": [1e308]}, "per_item of ppl_128 holds something other than measures"),
        ("parameters", 0, "parameters is 0, expected a size"),
        ("bytes", 1e300, "bytes is 1e+300, expected a size"),
        ("data", {"sha256": ["s"]}, "sha256 of data is no text"),
        ("seconds", math.nan, "seconds is nan, expected a number from 0 up"),
        ("command_seconds", -1, "command_seconds is -1, expected a number from 0 up"),
        ("peak_rss_bytes", math.inf, "peak_rss_bytes is inf, expected a number from 0 up"),
        ("peak_device_bytes", "4 GB", "peak_device_bytes is '4 GB', expected a number"),
        ("figures", {"ppl_128": {"value": 2.0, "unit": "ppl", "n": math.inf}}, "n is inf, expected a number from 0 up"),
        ("figures", {"ppl_128": {"value": 2.0, "unit": "ppl", "n": 2, "note": [1]}}, "note is [1], expected a string"),
    ],
)
def test_what_no_comparison_could_use_is_refused(tmp_path: Path, entry: str, value: object, says: str) -> None:
    record = result("a", Figure(2.0, 0.1, "ppl", 2), [0.5, 0.9]).to_json() | {entry: value}
    (tmp_path / "results.json").write_text(json.dumps(record))
    with pytest.raises(ShortstackError, match=re.escape(says)):
        load_results(tmp_path / "results.json")
