"""The record of a curve: what it costs to remove 1, 2, ... blocks of one checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shortstack.common.formatting import count, counted, ranges
from shortstack.common.shown import Shown
from shortstack.common.tables import Table

SCHEMA = 1


@dataclass(frozen=True)
class CurvePoint:
    """The cost of removing a number of blocks, measured on validation windows.

    Attributes:
        removed: The removed blocks, by their numbers in the original model.
        parameters: The number of remaining parameters.
        ppl: The perplexity without these blocks. Lower is better.
        increase: The increase of the perplexity, as a share of the dense model's: 0.1 is 10 % more.
        stderr: The standard error of the increase, paired over windows; None for a single window.
        sources: The `ppl`, `increase` and `stderr` of each named source.
    """

    removed: tuple[int, ...]
    parameters: int
    ppl: float
    increase: float
    stderr: float | None
    sources: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)

    @property
    def number(self) -> int:
        """The number of removed blocks."""
        return len(self.removed)


@dataclass(frozen=True, repr=False)
class Curve(Shown):
    """The perplexity against the number of removed blocks.

    Attributes:
        source: The checkpoint, as it was named in the call.
        fingerprint: The fingerprint of the checkpoint.
        selection: The method that chose the set of each size.
        dense_ppl: The perplexity of the dense model.
        one_token_ppl: The perplexity of the dense model when it sees only the token before the predicted one.
        points: One point for each number of removed blocks, ascending, without 0. Sizes without a removable set are
            missing.
        why: The calibration set and the settings.
    """

    source: str
    fingerprint: str
    selection: str
    dense_ppl: float
    one_token_ppl: float
    points: tuple[CurvePoint, ...]
    why: dict[str, Any] = field(default_factory=dict)

    @property
    def knee(self) -> int | None:
        """The number of removed blocks where the curve of log-perplexity bends most; None if it does not bend.

        It is the point furthest below the straight line from the dense model to the last point.
        """
        heights = [
            math.log(point.ppl / self.dense_ppl) if math.isfinite(point.ppl) else math.inf for point in self.points
        ]
        return bend([0.0, *heights], [0, *(point.number for point in self.points)])

    @property
    def point_of_no_return(self) -> int | None:
        """The smallest number of removed blocks whose perplexity is not below `one_token_ppl`; None if none is."""
        return next((point.number for point in self.points if not point.ppl < self.one_token_ppl), None)

    def to_json(self) -> dict[str, Any]:
        """The JSON form (schema 1)."""
        return {
            "schema": SCHEMA,
            "model": {"source": self.source, "fingerprint": self.fingerprint},
            "selection": self.selection,
            "dense_ppl": self.dense_ppl,
            "one_token_ppl": self.one_token_ppl,
            "knee": self.knee,
            "point_of_no_return": self.point_of_no_return,
            "points": [
                {**vars(point), "removed": list(point.removed), "sources": dict(point.sources)} for point in self.points
            ],
            "why": self.why,
        }

    def table_rows(self) -> list[dict[str, Any]]:
        """One row for each number of removed blocks."""
        return [{"blocks removed": point.number, **_flat(point)} for point in self.points]

    def to_text(self) -> str:
        """What a person reads on the terminal."""
        marks = {self.knee: "knee", self.point_of_no_return: "no return"}
        if self.knee is not None and self.knee == self.point_of_no_return:
            marks = {self.knee: "knee, no return"}
        rows = [["0", "none", "", f"{self.dense_ppl:.4g}", "", ""]]
        for point in self.points:
            error = f" ±{100 * point.stderr:.1f}" if point.stderr is not None else ""
            change = f"{point.increase:+.1%}{error}"
            rows.append(
                [
                    str(point.number),
                    ranges(point.removed),
                    count(point.parameters),
                    f"{point.ppl:.4g}",
                    change,
                    marks.get(point.number, ""),
                ]
            )
        one_token = f"the dense model that sees one token ({self.one_token_ppl:.4g})"
        notes = [
            f"knee: up to {counted(self.knee, 'block')} the curve is flatter than after" if self.knee else "no knee",
            f"no return: from {counted(self.point_of_no_return, 'block')} on it predicts no better than {one_token}"
            if self.point_of_no_return
            else f"always better than {one_token}",
        ]
        title = f"{self.source}: perplexity against blocks removed, sets chosen by {self.selection}"
        whole = Table(["blocks", "removed", "parameters", "perplexity", "change", ""], rows, title, notes).to_text()
        return f"{whole}\n\n{self._of_sources().to_text()}" if self.points and self.points[0].sources else whole

    def _of_sources(self) -> Table:
        """By how much the perplexity of each named source grows."""
        sources = list(self.points[0].sources)
        rows = []
        for point in self.points:
            cells = []
            for source in sources:
                own = point.sources[source]
                error = f" ±{100 * own['stderr']:.1f}" if own["stderr"] is not None else ""
                cells.append(f"{own['increase'] or 0:+.1%}{error}")
            rows.append([str(point.number), *cells])
        return Table(["blocks", *sources], rows, "change of each source's perplexity")


def _flat(point: CurvePoint) -> dict[str, Any]:
    """A point's figures in one row."""
    own = {name: value for name, value in vars(point).items() if name != "sources"}
    return own | {"removed": ranges(point.removed)} | {name: one["increase"] for name, one in point.sources.items()}


def bend(heights: Sequence[float], places: Sequence[int] | None = None) -> int | None:
    """The place where a rising curve is furthest below the straight line between its ends; None where it never is.

    Args:
        heights: of the curve.
        places: where they are, rising from 0; by default 0, 1, 2, ...
    """
    places = range(len(heights)) if places is None else places
    if len(heights) < 3 or not math.isfinite(heights[-1]):
        return None
    slope = (heights[-1] - heights[0]) / places[-1]
    below = {place: heights[0] + slope * place - height for place, height in zip(places, heights, strict=True)}
    place = max(below, key=below.__getitem__)
    return place if below[place] > 1e-9 * abs(heights[-1]) and place else None
