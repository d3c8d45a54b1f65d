"""Accuracies on tasks as people know them from lm-evaluation-harness: task, metric, value ± standard error, a row each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from shortstack.common.formatting import count, seconds, short_names, size
from shortstack.common.tables import Table

if TYPE_CHECKING:
    from shortstack.artifacts.results import Figure, Result


def task_table(results: Sequence[Result], title: str) -> Table:
    """A row per task, metric and model; the models of a task stand together. Below, what each model is and took."""
    models = short_names([result.model for result in results])
    names = list(dict.fromkeys(name for result in results for name in result.figures))
    rows = []
    for name in names:
        task, _, metric = name.partition(" ")
        for model, result in zip(models, results, strict=True):
            if name in result.figures:
                rows.append([task, metric, model, *_cells(result.figures[name])])
    head = ["task", "metric", "model", "value", "±", "stderr"]
    if len(results) == 1:
        head, rows = [*head[:2], *head[3:]], [[*row[:2], *row[3:]] for row in rows]
    words = len(head) - 3
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(words)]
    head, *rows = [[*map(str.ljust, row[:words], widths), *row[words:]] for row in [head, *rows]]
    facts = [_facts(model, result) for model, result in zip(models, results, strict=True)]
    return Table(head, rows, title, ["higher is better", *facts])


def _cells(figure: Figure) -> list[str]:
    if figure.value is None:
        return ["-", "", ""]
    return [f"{figure.value:.4f}", *(["±", f"{figure.stderr:.4f}"] if figure.stderr is not None else ["", ""])]


def _facts(model: str, result: Result) -> str:
    peak = result.peak_rss_bytes if result.peak_device_bytes is None else result.peak_device_bytes
    return (
        f"{model}: {count(result.parameters)} parameters, {size(result.nbytes)}; "
        f"peak memory {size(peak)}, {seconds(result.seconds)}"
    )
