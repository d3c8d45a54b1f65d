"""The record of a comparison: every figure of every model, against one of them, and how it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from shortstack.artifacts.results import Figure, shown_figure
from shortstack.baselines.figures import PublishedResult
from shortstack.common.formatting import count, legend, short_names, size
from shortstack.common.shown import Shown
from shortstack.common.significance import LEVEL, MANY, student_errors
from shortstack.common.tables import Table

_SAME = "≈"
_MEASURES = ("s", "tokens/s", "W", "MHz", "degrees Celsius")  # units that a figure alone does not show


@dataclass(frozen=True)
class Difference:
    """The difference of one figure between a model and the base model.

    Attributes:
        value: For perplexities the ratio minus 1; for other figures the plain difference.
        stderr: The standard error of the value; None if it is unknown.
        pairs: The number of items that both models were measured on; 0 if the error is that of two separate figures.
        p: The probability of a difference at least this large if the models do not differ; None if it is unknown.
    """

    value: float
    stderr: float | None
    pairs: int
    p: float | None = None

    @property
    def is_noise(self) -> bool | None:
        """Whether `p` is above 5 %, so that the difference may be chance; None if `p` is unknown."""
        return None if self.p is None else self.p > LEVEL

    @property
    def margin(self) -> float:
        """Half the width of the 95 % confidence interval."""
        return 0.0 if self.stderr is None else self.stderr * student_errors(self.pairs or MANY)

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "value": self.value, "stderr": self.stderr, "pairs": self.pairs, "p": self.p, "within_noise": self.is_noise,
        }  # fmt: skip


@dataclass(frozen=True)
class ComparedFigure:
    """One figure of all models.

    Attributes:
        what: The kind of evaluation, such as ppl.
        data: The text or task.
        name: The name of the figure.
        figures: The figure of each model; None if it was not measured.
        differences: The difference of each model from the base model; None for the base model and for missing figures.
        published: The value of each published model; None if none was published.
    """

    what: str
    data: str
    name: str
    figures: list[Figure | None]
    differences: list[Difference | None]
    published: list[float | None] = field(default_factory=list)


@dataclass(frozen=True, repr=False)
class Comparison(Shown):
    """The figures of several models, side by side.

    Attributes:
        models: The names of the models, with the base model first.
        parameters: The number of parameters of each model.
        nbytes: The size of the weights of each model in bytes.
        figures: The figures, in the order of the results.
        published: The published models that are shown beside the others.
        notes: What a reader of the figures should know.
    """

    models: list[str]
    parameters: list[int]
    nbytes: list[int]
    figures: list[ComparedFigure]
    published: list[PublishedResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "schema": 1,
            "what": "compare",
            "models": self.models,
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "published": [published.name for published in self.published],
            "figures": [
                {
                    "what": one.what,
                    "data": one.data,
                    "name": one.name,
                    "figures": [None if figure is None else figure.to_json() for figure in one.figures],
                    "differences": [None if found is None else found.to_json() for found in one.differences],
                    "published": one.published,
                }
                for one in self.figures
            ],
            "notes": self.notes,
        }

    def table_rows(self) -> list[dict[str, Any]]:
        """One row for each figure and model."""
        found = []
        for one in self.figures:
            for model, figure, difference in zip(self.models, one.figures, one.differences, strict=True):
                row: dict[str, Any] = {"what": one.what, "data": one.data, "figure": one.name, "model": model}
                row |= {"value": figure and figure.value, "stderr": figure and figure.stderr}
                against = (
                    {"difference": difference.value, "its stderr": difference.stderr, "noise": difference.is_noise}
                    if difference
                    else {}
                )
                found.append(row | against)
        return found

    def to_text(self) -> str:
        """One table for each kind of evaluation and text."""
        return "\n\n".join([*(one.to_text() for one in self.tables()), "\n".join(self.reading())])

    def tables(self) -> list[Table]:
        """One table of sizes, then one table for each kind of evaluation and text."""
        sizes = [self._sizes("parameters", self.parameters, count), self._sizes("bytes", self.nbytes, size)]
        found = [self._table("", sizes)]
        for what, data in dict.fromkeys((one.what, one.data) for one in self.figures):
            rows = [self._row(one) for one in self.figures if (one.what, one.data) == (what, data)]
            found.append(self._table(f"{what} on {data}", rows))
        return found

    def reading(self) -> list[str]:
        """An explanation of the marks in the tables, and what a reader should know."""
        lines = legend(self.models)
        lines += [
            f"differences are relative to {short_names(self.models)[0]}, with paired standard errors; those of perplexities "
            f"are ratios; {_SAME} is within noise (chance alone makes such a difference more than {LEVEL:.0%} of the time)"
        ]
        if self.published:
            lines.append(f"published: {self.published[0].note}")
        return [*lines, *self.notes]

    def _table(self, title: str, rows: Sequence[list[str]]) -> Table:
        dense, *others = short_names(self.models)
        heads = ["", dense]
        for model in others:
            heads += [model, "difference"]
        heads += [f"published {published.name}" for published in self.published]
        if self.published and not any(
            any(row[-len(self.published) :]) for row in rows
        ):  # nothing of this was published
            heads, rows = heads[: -len(self.published)], [row[: -len(self.published)] for row in rows]
        return Table(heads, rows, title)

    def _sizes(self, name: str, values: Sequence[int], show: Any) -> list[str]:
        cells = [show(values[0])]
        for value in values[1:]:
            cells += [show(value), f"{value / values[0] - 1:+.1%}"]
        published = [show(one.parameters) if name == "parameters" else "" for one in self.published]
        return [name, *cells, *published]

    def _row(self, one: ComparedFigure) -> list[str]:
        cells = [shown_figure(one.figures[0])]
        for figure, difference in zip(one.figures[1:], one.differences[1:], strict=True):
            unit = figure.unit if figure is not None else ""
            cells += [shown_figure(figure), _shown(difference, unit)]
        unit = next((figure.unit for figure in one.figures if figure is not None), "")
        published = ["" if value is None else shown_figure(Figure(value, None, unit, 0)) for value in one.published]
        return [f"{one.name}, {unit}" if unit in _MEASURES else one.name, *cells, *published]


def _shown(difference: Difference | None, unit: str) -> str:
    if difference is None:
        return "-"
    mark = f"{_SAME} " if difference.is_noise else ""
    if unit in ("ppl", "accuracy", "share"):
        error = "" if difference.stderr is None else f" ±{100 * difference.stderr:.2g}"
        sign = "%" if unit == "ppl" else " points"
        return f"{mark}{100 * difference.value:+z.1f}{sign}{error}"
    if unit == "bytes":
        return f"{mark}{'-' if difference.value < 0 else '+'}{size(round(abs(difference.value)))}"
    error = "" if difference.stderr is None else f" ±{difference.stderr:.2g}"
    return f"{mark}{difference.value:+.3g}{error}"
