"""Figures of results files, as a model card shows them: tables, and the hub's metadata (`model-index`, `.eval_results`)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.artifacts.results import Figure, Result, shown_figure
from shortstack.artifacts.units import unit_differences
from shortstack.common.formatting import count
from shortstack.common.json_fields import nested
from shortstack.common.json_text import read_json
from shortstack.common.paths import public_name, without_paths
from shortstack.publishing.card_text import CardFigures, plain_markdown

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, EvalResultEntry

# What a text or a task is on the hub: data set, configuration, split.
_ON_THE_HUB = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    "ptb": ("ptb-text-only/ptb_text_only", "penn_treebank", "validation"),
    "c4": ("allenai/c4", "en", "validation"),
    "boolq": ("aps/super_glue", "boolq", "validation"),
    "piqa": ("baber/piqa", None, "validation"),
    "hellaswag": ("Rowan/hellaswag", None, "validation"),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "validation"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test"),
    "openbookqa": ("allenai/openbookqa", "main", "test"),
}
_METRICS = {"acc": "accuracy", "acc_norm": "accuracy, normalized by length"}
_HEADINGS = {
    "ppl": "Perplexity",
    "zeroshot": "Zero-shot accuracy",
    "generation": "Generation",
    "bench": "Speed and memory",
}


def figures_of(results: Sequence[Result], dense: Sequence[Result]) -> CardFigures:
    """The figures of a checkpoint, beside those of the dense model where these were measured in the same way.

    Args:
        results: of the checkpoint.
        dense: of the dense model.
    """
    tables = [_table(result, _counterpart(result, dense)) for result in results if result.figures]
    return CardFigures(tables, [entry for result in results for entry in _model_index(result)])


def benchmark_entries(results: Iterable[Result]) -> list[EvalResultEntry]:
    """Accuracies on all rows of tasks that are data sets on the hub, for `.eval_results/*.yaml`, in percent."""
    from huggingface_hub import EvalResultEntry

    from shortstack.evaluation.task_files import TASKS

    entries = []
    for result in results:
        if result.what != "zeroshot" or result.settings.get("limit"):
            continue
        for name, figure in result.figures.items():
            task, _, metric = name.partition(" ")
            if task in TASKS and metric == TASKS[task].metric and _is_finite(figure):  # the hub takes one score a task
                dataset, _, split = _ON_THE_HUB[task]
                notes = (
                    f"{_METRICS.get(metric, metric)}, {split} split, {_shots(result)}, lm-eval's {task} by shortstack"
                )
                entries.append(EvalResultEntry(dataset, task, round(100 * float(figure.value or 0), 2), notes=notes))
    return entries


def retraining_figures(directory: Path) -> list[str]:
    """The table of before, after and dense that retraining leaves beside the weights; nothing where there is none."""
    try:
        models = read_json((directory / "retraining.json").read_bytes())["models"]
        names = list(dict.fromkeys(name for row in models.values() for name in row["figures"]))
        rows = [
            [which, count(row["parameters"]), *(_number(row["figures"].get(n)) for n in names)]
            for which, row in models.items()
        ]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return []
    if not names:
        return []
    header = [
        "",
        "parameters",
        *("validation loss (nats per token)" if name == "validation" else name for name in names),
    ]
    return [f"### Retraining\n\n{_markdown(header, rows)}"]


def _table(result: Result, dense: Result | None) -> str:
    """A table of all figures of a result."""
    source = plain_markdown(public_name(str(result.data.get("source", ""))))
    heading = f"### {_HEADINGS.get(result.what, plain_markdown(result.what))}{f': {source}' if source else ''}"
    header = ["", "this model", *(["dense model"] if dense else [])]
    rows = [
        [name, shown_figure(figure), *([shown_figure(dense.figures.get(name))] if dense else [])]
        for name, figure in result.figures.items()
    ]
    notes = [plain_markdown(str(without_paths(note))) for note in result.notes if result.model not in note]
    settings = [f"{key} {result.settings[key]}" for key in ("dtype", "device", "engine") if key in result.settings]
    return "\n\n".join([heading, _markdown(header, rows), plain_markdown(", ".join([*settings, *notes]))]).rstrip()


def _counterpart(result: Result, dense: Sequence[Result]) -> Result | None:
    """The dense model's result of the same kind, text and settings."""
    return next(
        (
            other
            for other in dense
            if (other.what, other.data.get("sha256")) == (result.what, result.data.get("sha256"))
            and _conditions(other) == _conditions(result)
            and not unit_differences(result, other)
        ),
        None,
    )


def _conditions(result: Result) -> dict[str, Any]:
    """The settings, but for what is the model's own: its depth, and what the machine reached while it was measured."""
    return {name: value for name, value in result.settings.items() if name not in ("blocks", "machine")}


def _model_index(result: Result) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    if result.what not in ("ppl", "zeroshot"):
        return []
    entries = []
    for name, figure in result.figures.items():
        task, _, metric = name.partition(" ")
        source = str(result.data.get("source", "")) if result.what == "ppl" else task
        if not _is_finite(figure) or (result.what == "zeroshot" and not metric):
            continue  # a mean over tasks is on no data set
        dataset, config, split = _ON_THE_HUB.get(source, (_slug(source), None, None))
        scale = 100 if figure.unit == "accuracy" else 1
        args = {"limit": result.settings["limit"]} if result.settings.get("limit") else None
        entries.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=dataset,
                dataset_name=public_name(source) or "text",
                dataset_config=config,
                dataset_split=split,
                dataset_args=args,
                metric_type="perplexity" if result.what == "ppl" else metric,
                metric_name=_metric_name(name if result.what == "ppl" else _METRICS.get(metric, metric), figure),
                metric_value=round(scale * float(figure.value or 0), 4),
            )
        )
    return entries


def _metric_name(name: str, figure: Figure) -> str:
    percent = figure.unit == "accuracy"
    error = "" if figure.stderr is None else f", standard error {(100 if percent else 1) * figure.stderr:.2g}"
    return f"{name}{' (percent' if percent else ' (lower is better'}{error})"


def _shots(result: Result) -> str:
    shots = nested(result.settings, "num_fewshot")
    return f"{shots} examples" if shots else "zero-shot"


def _is_finite(figure: Figure) -> bool:
    return figure.value is not None and math.isfinite(figure.value)


def _slug(source: str) -> str:
    """A name in the form that the hub takes for a data set."""
    return re.sub(r"[^\w.-]+", "-", public_name(source)).strip("-.") or "text"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else "-"


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown; the first column is of words, the others of figures."""
    cells = [[plain_markdown(str(without_paths(cell))) for cell in row] for row in (header, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], f"|---|{'---:|' * (len(header) - 1)}", *lines[1:]])


def results_of(loaded: Iterable[Result], fingerprint: str) -> list[Result]:
    """Those of one checkpoint."""
    return [result for result in loaded if result.fingerprint == fingerprint]
