"""What all pictures drawn with matplotlib share: a figure with its axes, and its PNG."""

from __future__ import annotations

import io
from typing import Any


def drawing(title: str = "", x: str = "", y: str = "", *, inches: tuple[float, float] = (7, 4)) -> tuple[Any, Any]:
    """(figure, axes) that need no display and change no setting of the process."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize=10)
    return figure, axes


def png(figure: Any) -> bytes:
    """The picture."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150)
    return stream.getvalue()
