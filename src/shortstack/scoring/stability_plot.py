"""The heat map of `stability`: what share of the blocks that would go every two rankings have in common."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from shortstack.common.pictures import drawing, png
from shortstack.runtime.atomic_output import write_file

if TYPE_CHECKING:
    from shortstack.scoring.stability import Stability


def shares(found: Stability) -> list[list[float]]:
    """[ranking][ranking], from 0 to 1."""
    chosen = [
        set([block for block in one.order if block not in found.protected][: found.remove]) for one in found.rankings
    ]
    return [[len(first & second) / found.remove for second in chosen] for first in chosen]


def write_heat_map(found: Stability, path: Path) -> None:
    """Draw it as PNG."""
    values, names = shares(found), [one.name for one in found.rankings]
    size = 3 + 0.35 * len(names)
    title = f"share of the {found.remove} blocks that both would remove"
    figure, axes = drawing(title, inches=(size + 1, size))
    picture = axes.imshow(values, vmin=0, vmax=1, cmap="viridis")
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    figure.colorbar(picture)
    write_file(path, png(figure))
