"""What is drawn, as figures: the page draws it as SVG, `--png` with matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from shortstack.artifacts.ranking_text import Scale
from shortstack.artifacts.results import Result
from shortstack.artifacts.scores import CriterionScores
from shortstack.artifacts.source_table import costs_of_source, sources_table
from shortstack.artifacts.training import NATS, TrainingLog
from shortstack.common.formatting import count, size
from shortstack.common.significance import MANY, student_errors
from shortstack.evaluation.comparison import Comparison
from shortstack.publishing.report.names import figure_name

_CONFIGURATIONS = 4  # that are drawn; the table has all
_BITS = {"float64": 64, "float32": 32}


@dataclass(frozen=True)
class Bar:
    """A bar with an error.

    Attributes:
        label, text: what it is of, and its value.
        parts: lengths that are stacked.
        low, high: the ends of its whisker; None for none.
        floor: the least that it could be; None where that is not known.
        marked: it is one of those that are told apart.
        cut: it is longer than is drawn.
    """

    label: str
    text: str
    parts: tuple[float, ...]
    low: float | None = None
    high: float | None = None
    floor: float | None = None
    marked: bool = False
    cut: bool = False


@dataclass(frozen=True)
class Bars:
    """Bars under one another, from zero to `full`."""

    name: str
    title: str
    caption: str
    bars: list[Bar]
    full: float
    legend: tuple[str, ...] = ()


@dataclass(frozen=True)
class Point:
    """A value with its interval; `is_noise` is None where no error is known; `ideal` is what it could be at best."""

    label: str
    text: str
    value: float
    half_width: float
    is_noise: bool | None
    ideal: float | None = None


@dataclass(frozen=True)
class Points:
    """Values beside a reference, in groups with a heading each."""

    name: str
    title: str
    caption: str
    groups: list[tuple[str, list[Point]]]
    reference: float
    unit: str


@dataclass(frozen=True)
class Curves:
    """Lines over steps."""

    name: str
    title: str
    caption: str
    lines: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    unit: str = NATS


@dataclass(frozen=True)
class HeatMap:
    """A row per block and a column per named source; the darker a cell, the more that source pays.

    Attributes:
        columns: the sources.
        rows: per block its label, and per source (how dark, from 0 to 1, and the figure).
    """

    name: str
    title: str
    caption: str
    columns: tuple[str, ...]
    rows: list[tuple[str, list[tuple[float, str]]]]


def source_map(found: CriterionScores, removed: Sequence[int], protected: Sequence[int]) -> HeatMap | None:
    """What each named source pays for each block, in the order of the model; None where the text has one source."""
    if not found.sources:
        return None
    costs = {source: costs_of_source(found, source) for source in found.sources}
    table = sources_table(found)
    texts = {int(row[0]): [cell.partition(" ±")[0] for cell in row[1:]] for row in table.rows}
    finite = sorted(cost for own in costs.values() for cost in own.values() if math.isfinite(cost) and cost > 0)
    full = min(finite[-1], 3 * finite[len(finite) // 2]) if finite else 1.0
    rows = []
    for block in found.blocks:
        sign = "✕ " if block in removed else "◆ " if block in protected else ""
        shares = [min(1.0, max(0.0, own[block] / full)) for own in costs.values()]
        rows.append((f"{sign}{block}", list(zip(shares, texts[block], strict=True))))
    what = "changes of the perplexity without the block" if found.dense_ppl else "scores"
    return HeatMap(
        f"sources-{found.name}",
        f"Cost for each source, by {found.name}",
        f"The figures are {what}. Darker cells {'add more NLL' if found.dense_ppl else 'have higher scores'}.",
        tuple(found.sources),
        rows,
    )


def score_bars(found: CriterionScores, removed: Sequence[int], protected: Sequence[int], windows: int) -> Bars | None:
    """The scores of a criterion, a bar per block in the order of the model; None of a bare order."""
    values = found.by_block()
    if values is None:
        return None
    scale, bars = Scale.of(found), []
    for at, (block, value) in enumerate(values.items()):
        share, error = scale.share(value), found.stderr[at] if found.stderr is not None else None
        low = high = None
        if error is not None and math.isfinite(error) and share <= 1:
            half = student_errors(windows or MANY) * error
            low, high = (min(1.0, scale.share(value, sign * half)) for sign in (-1, 1))
        change = f"{value / found.dense_ppl - 1:+z.1%}" if found.dense_ppl and value < 10 * found.dense_ppl else ""
        text = change or (f"x{value / found.dense_ppl:.0f}" if found.dense_ppl else _short(value))
        sign = "✕ " if block in removed else "◆ " if block in protected else ""
        marked = block in removed
        bars.append(Bar(f"{sign}{block}", text, (min(1.0, share),), low, high, None, marked, share > 1))
    what = "changes of the perplexity without the block" if found.dense_ppl else "scores"
    errors = "Whiskers are 95 % confidence intervals." if found.stderr is not None else "This criterion has no error."
    caption = f"Bars show {scale.name}. The figures are {what}. {errors}"
    return Bars(f"scores-{found.name}", f"Scores by {found.name}", caption, bars, 1.0)


def _short(value: float) -> str:
    return count(round(value)) if 10000 <= value < 1e15 else f"{value:.4g}"


def difference_points(comparison: Comparison) -> list[Points]:
    """What every figure changed by against the first model: perplexities in percent, accuracies in points."""
    found = []
    for what, unit, name, title in (
        ("ppl", "%", "perplexity", "Change of perplexity"), ("zeroshot", " points", "accuracy", "Change of accuracy"),
    ):  # fmt: skip
        groups = []
        for one in comparison.figures:
            points = [
                Point(
                    model, f"{100 * change.value:+z.1f}{unit}", 100 * change.value,
                    100 * change.margin, change.is_noise,
                )
                for model, change in zip(comparison.models, one.differences, strict=True)
                if one.what == what and change is not None and math.isfinite(change.value)
            ]  # fmt: skip
            if points:
                groups.append((figure_name(what, one.name) + (f", {one.data}" if what == "ppl" else ""), points))
        if groups:
            caption = (
                f"Difference from {comparison.models[0]}. Lines are 95 % confidence intervals of paired differences. Hollow "
                "points are within noise."
            )
            found.append(Points(name, title, caption, groups, 0.0, unit))
    return found


def training_curves(name: str, log: TrainingLog) -> Curves | None:
    """Training and validation loss over steps; None where nothing was logged."""
    pairs = (("training", "loss"), ("validation", "validation"))
    lines = {label: [p for p in log.curve(key) if math.isfinite(p[1])] for label, key in pairs}
    drawn = {label: points for label, points in lines.items() if points}
    if not drawn:
        return None
    return Curves(f"training-{name}", f"Training of {name}", "Loss over optimizer steps.", drawn, log.unit)


def latency_bars(results: Sequence[Result]) -> list[Bars]:
    """Time per configuration: prompt and generation stacked, with the least that the machine allows."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        if result.figures["latency"].value is not None:
            groups.setdefault(str(result.data.get("source", "")), []).append(result)
    found: list[Bars] = []
    for label, group in list(groups.items())[:_CONFIGURATIONS]:
        bars = [_latency_bar(one) for one in group]
        full = max(sum(bar.parts) for bar in bars)
        full = max([full, *(bar.high for bar in bars if bar.high is not None)])
        caption = (
            "Median of the runs with a 95 % confidence interval. The vertical line is the lower bound on this machine."
        )
        found.append(Bars(f"latency-{len(found) + 1}", label, caption, bars, full or 1.0, ("prompt", "generation")))
    return found


def _latency_bar(result: Result) -> Bar:
    value = result.figures["latency"].value or 0.0
    error, half = result.figures["latency"].stderr, student_errors(result.figures["latency"].n)
    prefill = min(value, _value(result, "prefill") or 0.0)
    first, each = _value(result, "prefill_floor"), _value(result, "tpot_floor")
    steps = max(0, result.settings["new_tokens"] - 1)
    floor = None if first is None or each is None else first + steps * each
    low, high = (None, None) if error is None else (value - half * error, value + half * error)
    text = f"{1000 * value:.3g} ms" if value < 1 else f"{value:.3g} s"
    return Bar(result.model, text, (prefill, value - prefill), low, high, floor)


def memory_bars(results: Sequence[Result]) -> Bars | None:
    """Peak memory of each model in the largest configuration, beside what its weights take."""
    held = [(one, one.peak_device_bytes or one.peak_rss_bytes) for one in results]
    largest = {one.model: (one, peak) for one, peak in sorted(held, key=lambda pair: pair[1]) if peak}
    if not largest:
        return None
    bars = []
    for model in dict.fromkeys(one.model for one in results if one.model in largest):
        result, peak = largest[model]
        weights = result.parameters * _BITS.get(str(result.settings["dtype"]), 16) / 8
        bars.append(Bar(model, size(peak), (peak / 1e9,), floor=min(weights, peak) / 1e9))
    caption = "The peak over all configurations. The vertical line is the size of the weights."
    return Bars("memory", "Peak memory", caption, bars, max(bar.parts[0] for bar in bars))


def speedup_points(results: Sequence[Result]) -> Points | None:
    """How many times as fast each model is as the first, beside the ideal; None where that was not measured."""
    groups: dict[str, list[Point]] = {}
    for result in results:
        for part, name in (("latency", "whole"), ("prefill", "prompt"), ("decode", "generation")):
            figure = result.figures.get(f"{part}_speedup")
            if figure is None or figure.value is None:
                continue
            half = student_errors(figure.n) * (figure.stderr or 0.0)
            noise = None if figure.stderr is None else abs(figure.value - 1) <= half
            label = result.model if part == "latency" else f"  {name}"
            text, ideal = f"{figure.value:.2f}x", _value(result, f"{part}_ideal")
            of = result.settings
            heading = f"{of['engine']}, batch {of['batch']}, {of['prompt_tokens']} + {of['new_tokens']} tokens"
            group = groups.setdefault(heading, [])
            group.append(Point(label, text, figure.value, half, noise, ideal))
    if not groups:
        return None
    shown = list(groups.items())[:_CONFIGURATIONS]
    caption = (
        "Lines are 95 % confidence intervals of paired runs. Hollow points are within noise. The vertical line is the ideal "
        "speed-up for the remaining work."
    )
    return Points("speedup", f"Speed-up over {results[0].model}", caption, shown, 1.0, "times")


def _value(result: Result, name: str) -> float | None:
    figure = result.figures.get(name)
    return None if figure is None else figure.value
