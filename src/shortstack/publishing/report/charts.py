"""Plots as SVG in the page: colours are the page's (light and dark), each with a title and a text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from shortstack.publishing.report.names import shared
from shortstack.publishing.report.plots import Bar, Bars, Curves, HeatMap, Point, Points

if TYPE_CHECKING:
    from markupsafe import Markup

_WIDTH = 380
_ROW = 17
_LEFT = 2
_CHARACTER = 6.8  # the width of one, about
_TICKS = (1, 2, 2.5, 5, 10)


def bars_svg(plot: Bars) -> Markup:
    """Bars under one another."""
    left = _label_width(bar.label for bar in plot.bars)
    right = _WIDTH - _label_width(bar.text + "  " for bar in plot.bars)
    top = 18 if plot.legend else 4
    parts = _legend(plot.legend, left)
    for number, bar in enumerate(plot.bars):
        parts += _bar(bar, plot.full, top + number * _ROW, left, right)
    described = "; ".join(f"{bar.label.strip()}: {bar.text}" for bar in plot.bars)
    return _svg(plot.title, described, top + len(plot.bars) * _ROW + 4, parts)


def _bar(bar: Bar, full: float, y: float, left: float, right: float) -> list[Markup]:
    middle = y + _ROW / 2
    marked = " marked" if bar.marked else ""
    parts = [_text(bar.label, left - 6, middle, "end", "label" + marked)]
    x = left
    for number, part in enumerate(bar.parts):
        width = part / full * (right - left)
        parts.append(_rect(x, y + 2, max(width, 0.5), _ROW - 4, f"bar part{number}{marked}"))
        x += width
    if bar.cut:
        parts.append(_text("▶", right - 9, middle, "middle", "cut"))
    if bar.low is not None and bar.high is not None:
        ends = [left + value / full * (right - left) for value in (bar.low, bar.high)]
        parts.append(_line(ends[0], middle, ends[1], middle, "whisker"))
        parts += [_line(end, middle - 3, end, middle + 3, "whisker") for end in ends]
    if bar.floor is not None:
        at = left + bar.floor / full * (right - left)
        parts.append(_line(at, y, at, y + _ROW, "floor"))
    return [*parts, _text(bar.text, right + 5, middle, "start", "figure" + marked)]


def points_svg(plot: Points) -> Markup:
    """Values beside a reference line, with their intervals."""
    points = [point for _, group in plot.groups for point in group]
    left = _label_width((point.label for point in points), most=130)
    right = _WIDTH - _label_width(point.text for point in points)
    ideals = [point.ideal for point in points if point.ideal is not None]
    ends = [end for p in points for end in (p.value - p.half_width, p.value + p.half_width)]
    low, high = min([plot.reference, *ends, *ideals]), max([plot.reference, *ends, *ideals])
    margin = 0.04 * (high - low) or 1.0
    low, high = low - margin, high + margin

    def at(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    parts, y = [], 4.0
    for heading, group in plot.groups:
        parts.append(_text(heading, _LEFT, y + _ROW / 2, "start", "heading"))
        y += _ROW
        for point in group:
            parts += _point(point, y, left, right, at(point.value), [at(one) for one in _ends(point)], at)
            y += _ROW
    parts.insert(0, _line(at(plot.reference), 4, at(plot.reference), y, "reference"))
    ticks = _ticks(low, high, 4)
    form = "{:g}" if plot.unit == "times" else "{:+g}"
    for tick in ticks:
        parts.append(_text(form.format(tick) if tick else "0", at(tick), y + 8, "middle", "tick"))
        parts.insert(0, _line(at(tick), 4, at(tick), y, "grid"))
    described = "; ".join(
        f"{heading}, {point.label.strip()}: {point.text}{' (within noise)' if point.is_noise else ''}"
        for heading, group in plot.groups
        for point in group
    )
    return _svg(plot.title, described, y + 18, parts)


def _ends(point: Point) -> tuple[float, float]:
    return point.value - point.half_width, point.value + point.half_width


def _point(
    point: Point, y: float, left: float, right: float, x: float, ends: Sequence[float], at: object
) -> list[Markup]:
    middle = y + _ROW / 2
    parts = [_text(point.label, left - 6, middle, "end", "label")]
    if point.half_width:
        parts.append(_line(ends[0], middle, ends[1], middle, "interval"))
    if point.ideal is not None and callable(at):
        parts.append(_line(at(point.ideal), y + 1, at(point.ideal), y + _ROW - 1, "floor"))
    look = "point hollow" if point.is_noise else "point"
    parts.append(_element("circle", cx=x, cy=middle, r=4, class_=look))
    return [*parts, _text(point.text, right + 5, middle, "start", "figure")]


def curves_svg(plot: Curves) -> Markup:
    """Lines over steps."""
    left, right, top, bottom = 44.0, _WIDTH - 12.0, 22.0, 180.0
    xs = [x for points in plot.lines.values() for x, _ in points]
    ys = [y for points in plot.lines.values() for _, y in points]
    x_low, x_high, y_low, y_high = min(xs), max(xs), min(ys), max(ys)
    margin = 0.05 * (y_high - y_low) or 0.05 * abs(y_high) or 1.0
    y_low, y_high = y_low - margin, y_high + margin

    def at(x: float, y: float) -> tuple[float, float]:
        share = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        return left + share * (right - left), bottom - (y - y_low) / (y_high - y_low) * (bottom - top)

    parts = _legend(tuple(plot.lines), left)
    for tick in _ticks(y_low, y_high, 4):
        y = at(x_low, tick)[1]
        parts += [_line(left, y, right, y, "grid"), _text(f"{tick:g}", left - 5, y, "end", "tick")]
    for tick in _ticks(x_low, x_high, 4):
        parts.append(_text(f"{tick:g}", at(tick, y_low)[0], bottom + 9, "middle", "tick"))
    for number, points in enumerate(plot.lines.values()):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
        parts.append(_element("polyline", points=path, class_=f"curve curve{number}"))
        if len(points) <= 24:
            for x, y in (at(*point) for point in points):
                parts.append(_element("circle", cx=x, cy=y, r=2.5, class_=f"dot dot{number}"))
    described = "; ".join(
        f"{name} loss from {points[0][1]:.4g} at step {points[0][0]:g} to {points[-1][1]:.4g} at step {points[-1][0]:g}"
        for name, points in plot.lines.items()
    )
    return _svg(plot.title, described, bottom + 20, parts)


def heat_svg(plot: HeatMap) -> Markup:
    """Cells in rows and columns, each with its figure."""
    left = _label_width(label for label, _ in plot.rows)
    width = (_WIDTH - left - 4) / len(plot.columns)
    parts = []
    for number, name in enumerate(plot.columns):
        most = max(3, int(width / _CHARACTER))
        short = name if len(name) <= most else name[: most - 1] + "…"
        parts.append(_text(short, left + (number + 0.5) * width, 9, "middle", "label"))
    for row, (label, cells) in enumerate(plot.rows):
        y = 18.0 + row * _ROW
        parts.append(_text(label, left - 6, y + _ROW / 2, "end", "label" + (" marked" if "✕" in label else "")))
        for number, (share, text) in enumerate(cells):
            x = left + number * width
            parts.append(
                _element(
                    "rect", x=x, y=y, width=width, height=float(_ROW), class_="cell", fill_opacity=f"{0.65 * share:.2f}"
                )
            )
            parts.append(_text(text, x + width / 2, y + _ROW / 2, "middle", "label"))
    described = "; ".join(
        f"{label.strip()}: " + ", ".join(f"{name} {text}" for name, (_, text) in zip(plot.columns, cells, strict=True))
        for label, cells in plot.rows
    )
    return _svg(plot.title, described, 22 + len(plot.rows) * _ROW, parts)


def _legend(names: Sequence[str], left: float) -> list[Markup]:
    parts, x = [], left
    for number, name in enumerate(names):
        parts += [_rect(x, 4, 9, 9, f"bar part{number}"), _text(name, x + 13, 9, "start", "label")]
        x += 26 + _CHARACTER * len(name)
    return parts


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers between two."""
    rough = (high - low) / about
    if not rough > 0:
        return [low]
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in _TICKS if factor * power >= rough * 0.999)
    first = math.ceil(low / step)
    return [round(number * step, 12) for number in range(first, math.floor(high / step) + 1)]


def _label_width(labels: Iterable[str], most: float = 150) -> float:
    return min(most, 12 + _CHARACTER * max((len(shared(label)) for label in labels), default=0))


def _svg(title: str, described: str, height: float, parts: Sequence[Markup]) -> Markup:
    from markupsafe import Markup

    inside = [_element("title", shared(title)), _element("desc", shared(described)), *parts]
    return Markup('<svg viewBox="0 0 {} {:.0f}" role="img">{}</svg>').format(_WIDTH, height, Markup("").join(inside))


def _rect(x: float, y: float, width: float, height: float, look: str) -> Markup:
    return _element("rect", x=x, y=y, width=width, height=height, class_=look)


def _line(x1: float, y1: float, x2: float, y2: float, look: str) -> Markup:
    return _element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=look)


def _text(text: str, x: float, y: float, anchor: str, look: str) -> Markup:
    shortened = shared(text)
    room = x if anchor == "end" else _WIDTH - x if anchor == "start" else _WIDTH
    most = max(3, int(room / _CHARACTER))
    if len(shortened) > most:
        shortened = shortened[: most - 1] + "…"
    return _element("text", shortened, x=x, y=y, text_anchor=anchor, dy="0.35em", class_=look)


def _element(name: str, text: str | None = None, **attributes: object) -> Markup:
    """One element; what it holds, and every value, is escaped."""
    from markupsafe import Markup

    found = Markup("").join(
        Markup(' {}="{}"').format(
            key.rstrip("_").replace("_", "-"), f"{value:.1f}" if isinstance(value, float) else value
        )
        for key, value in attributes.items()
    )
    if text is None:
        return Markup("<{}{}/>").format(Markup(name), found)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), found, text)
