"""The plots of a report as PNG files, drawn with matplotlib."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from shortstack.benchmark.plots import write_plots
from shortstack.common.pictures import drawing, png
from shortstack.publishing.report.names import shared
from shortstack.publishing.report.page import Report
from shortstack.publishing.report.plots import Bars, Curves, HeatMap, Points
from shortstack.runtime.atomic_output import write_file

_KEPT, _MARKED = "C0", "C3"


def write_pictures(report: Report, folder: Path) -> list[Path]:
    """Write every plot of the page, and those that `bench --plot` draws; their paths."""
    written = []
    for plot in report.plots():
        path = folder / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', plot.name)[:80]}.png"
        write_file(path, _drawn(plot))
        written.append(path)
    return [*written, *(write_plots(report.bench, folder) if report.bench else [])]


def _drawn(plot: Bars | Points | Curves | HeatMap) -> bytes:
    rows = len(plot.bars) if isinstance(plot, Bars) else 18
    if isinstance(plot, HeatMap):
        rows = len(plot.rows)
    if isinstance(plot, Points):
        rows = sum(1 + len(group) for _, group in plot.groups)
    figure, axes = drawing(_plain(plot.title), inches=(7, max(2.5, 1.2 + 0.2 * rows)))
    if isinstance(plot, Bars):
        _bars(axes, plot)
    elif isinstance(plot, Points):
        _points(axes, plot)
    elif isinstance(plot, HeatMap):
        _cells(axes, plot)
    else:
        _curves(axes, plot)
    return png(figure)


def _bars(axes: Any, plot: Bars) -> None:
    rows = range(len(plot.bars))
    left = [0.0] * len(plot.bars)
    for number in range(max(len(bar.parts) for bar in plot.bars)):
        widths = [bar.parts[number] if number < len(bar.parts) else 0.0 for bar in plot.bars]
        colours = [_MARKED if bar.marked else f"C{number}" for bar in plot.bars]
        label = plot.legend[number] if number < len(plot.legend) else None
        axes.barh(rows, widths, left=left, color=colours, label=label)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for row, bar in enumerate(plot.bars):
        if bar.low is not None and bar.high is not None:
            axes.plot([bar.low, bar.high], [row, row], "k|-", linewidth=1)
        if bar.floor is not None:
            axes.plot([bar.floor, bar.floor], [row - 0.45, row + 0.45], "k-", linewidth=1.5)
    axes.set_yticks(rows, [f"{_plain(bar.label)}  {_plain(bar.text)}" for bar in plot.bars], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel(_plain(plot.caption), fontsize=7)
    if plot.legend:
        axes.legend(fontsize=7)


def _points(axes: Any, plot: Points) -> None:
    labels: list[str] = []
    for heading, group in plot.groups:
        labels.append(_plain(heading))
        for point in group:
            face = "none" if point.is_noise else "C0"
            axes.errorbar(point.value, len(labels), xerr=point.half_width, fmt="o", color="C0", mfc=face, markersize=5)
            if point.ideal is not None:
                axes.plot([point.ideal] * 2, [len(labels) - 0.45, len(labels) + 0.45], "k-", linewidth=1.5)
            labels.append(f"{_plain(point.label)}  {_plain(point.text)}")
    axes.axvline(plot.reference, color="black", linewidth=1)
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="x")
    axes.set_xlabel(_plain(plot.caption), fontsize=7)


def _cells(axes: Any, plot: HeatMap) -> None:
    axes.imshow([[share for share, _ in cells] for _, cells in plot.rows], aspect="auto", cmap="Reds", vmin=0, vmax=1.4)
    for row, (_, cells) in enumerate(plot.rows):
        for column, (_, text) in enumerate(cells):
            axes.text(column, row, _plain(text), ha="center", va="center", fontsize=6)
    axes.set_xticks(range(len(plot.columns)), [_plain(name) for name in plot.columns], fontsize=7)
    axes.set_yticks(range(len(plot.rows)), [_plain(label) for label, _ in plot.rows], fontsize=7)
    axes.set_xlabel(_plain(plot.caption), fontsize=7)


def _curves(axes: Any, plot: Curves) -> None:
    for label, points in plot.lines.items():
        axes.plot(*zip(*points, strict=True), "o-" if len(points) <= 24 else "-", label=label, markersize=3)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel(f"loss ({plot.unit})")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _plain(text: str) -> str:
    """Text that matplotlib takes as it is: a dollar begins a formula there."""
    return shared(text).replace("$", r"\$")
