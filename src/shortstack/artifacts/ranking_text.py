"""A ranking of blocks as a person reads it on a terminal."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

from shortstack.common.formatting import bar, table

if TYPE_CHECKING:
    from shortstack.artifacts.scores import CriterionScores


def ranking_text(found: CriterionScores) -> str:
    """A table of blocks with bars, the one that is removed first on top; of a bare order the order alone."""
    values = found.by_block()
    if values is None:
        return f"{found.name}: an order alone, first = removed first\n  {', '.join(map(str, found.order))}"
    base = found.base
    # The first block often costs a hundred times what the others do: square roots, and a bar that is cut short (▶),
    # keep the others' bars apart.
    lengths = {
        index: math.sqrt(max(0.0, math.log(value / base))) if base is not None else abs(value)
        for index, value in values.items()
    }
    finite = [length for length in lengths.values() if math.isfinite(length)] or [1.0]
    full = min(max(finite), 3 * statistics.median(finite)) or 1.0
    rows = []
    for rank, index in enumerate(found.order, start=1):
        value = values[index]
        row = [f"{rank:>4}", str(index), f"{value:.6g}"]
        if base is not None:
            change = value / base
            row.append(f"{change - 1:+.1%}" if change < 10 else f"x{change:.0f}")
        if found.stderr is not None:
            row.append(f"{found.stderr[found.blocks.index(index)]:.4f}")
        drawn = bar(lengths[index] / full)
        rows.append([*row, (drawn[:-1] + "▶" if lengths[index] > full else drawn).ljust(28)])
    header = ["rank", "block", "score" if base is None else f"{found.name} without"]
    header += [] if base is None else ["change"]
    header += ["s.e. (NLL)"] if found.stderr is not None else []
    scale = "score" if base is None else "added NLL, square-root scale"
    title = f"{found.name}: lowest = least important = removed first"
    if base is not None:
        title += f"; dense {found.name} {base:.6g}"
    return title + "\n" + table([*header, scale.ljust(28)], rows)
