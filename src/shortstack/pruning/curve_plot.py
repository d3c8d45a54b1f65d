"""The picture of `curve`: perplexity beside the dense model's against the number of blocks removed."""

from __future__ import annotations

import math
from pathlib import Path

from shortstack.artifacts.curve import Curve
from shortstack.common.formatting import counted
from shortstack.common.pictures import drawing, png
from shortstack.runtime.atomic_output import write_file

Line = list[tuple[int, float, float]]  # blocks removed, perplexity beside the dense one, its standard error
_NEAR, _FAR = (
    (1, 1.1, 1.2, 1.5, 2, 3),
    (1, 2, 5),
)  # ticks of a perplexity that grows little; of each decade where it grows more


def lines(found: Curve) -> dict[str, Line]:
    """What is drawn: all text, and each named source; from the dense model up to where figures end."""
    drawn: dict[str, Line] = {"all text": [(0, 1.0, 0.0)]}
    for point in found.points:
        of_point = {"all text": {"increase": point.increase, "stderr": point.stderr}, **point.sources}
        for name, figures in of_point.items():
            growth = figures["increase"]
            if growth is not None and math.isfinite(growth):
                drawn.setdefault(name, [(0, 1.0, 0.0)]).append((point.number, 1 + growth, figures["stderr"] or 0.0))
    return drawn


def write_curve(found: Curve, path: Path) -> None:
    """Draw it as PNG, with the knee and the point of no return."""
    title = f"{found.source}: sets chosen by {found.selection}, perplexity {found.dense_ppl:.4g} dense"
    figure, axes = drawing(title, "blocks removed", "perplexity / dense perplexity")
    highest = 1.0
    for name, points in lines(found).items():
        numbers, ratios, errors = zip(*points, strict=True)
        bold = 2.0 if name == "all text" else 1.0
        axes.errorbar(numbers, ratios, errors, fmt="o-", markersize=4, capsize=3, linewidth=bold, label=name)
        highest = max(highest, *(ratio + error for ratio, error in zip(ratios, errors, strict=True)))
    for number, colour, what in (
        (found.knee, "black", "knee"),
        (found.point_of_no_return, "red", "point of no return"),
    ):
        if number is not None:
            axes.axvline(number, color=colour, linestyle="--", linewidth=1, label=f"{what}: {counted(number, 'block')}")
    if found.point_of_no_return is not None:
        level = found.one_token_ppl / found.dense_ppl
        axes.axhline(level, color="red", linestyle=":", linewidth=1, label="dense model that sees one token")
    decades = range(math.ceil(math.log10(highest)) + 1)
    ticks = _NEAR if highest <= _NEAR[-1] else [tick * 10**power for power in decades for tick in _FAR]
    axes.set_yscale("log")
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.set_ylim(0.95, 1.1 * highest)
    last = max((point.number for point in found.points), default=0)
    axes.set_xticks(range(0, last + 1, 1 if last <= 24 else 5))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="upper left")
    write_file(path, png(figure))
