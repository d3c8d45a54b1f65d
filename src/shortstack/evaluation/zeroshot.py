"""Zero-shot accuracy on the seven published tasks, or on any other of lm-evaluation-harness, side by side."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.artifacts.results import Figure, Result, Results, mean_of
from shortstack.common.json_text import json_text
from shortstack.common.options import stage
from shortstack.common.progress import Progress
from shortstack.errors import UsageError, did_you_mean
from shortstack.evaluation.evaluated_model import Subject, evaluated, open_subjects
from shortstack.evaluation.options import EvaluationOptions, TaskOptions
from shortstack.evaluation.task_files import MEAN, TASKS, local_rows
from shortstack.runtime.memory import Usage

if TYPE_CHECKING:
    from shortstack.evaluation.harness import LoadedTask

_TASKS, _DEFAULTS = TaskOptions(), EvaluationOptions()


@stage
def evaluate_zeroshot(
    *models: str,
    chosen: TaskOptions = _TASKS,
    limit: int | None = None,
    num_fewshot: int | None = None,
    out: Path | None = None,
    csv: Path | None = None,
    options: EvaluationOptions = _DEFAULTS,
) -> Results:
    """Measure zero-shot accuracy of checkpoints on the seven published tasks, and their mean. Higher is better.

    Prompts, choices and metrics are those of lm-evaluation-harness. As published, the metric is accuracy on BoolQ,
    PIQA, WinoGrande and ARC-easy, and accuracy by length-normalized likelihood on HellaSwag, ARC-challenge and
    OpenBookQA (Shortened LLaMA, section "evaluation").

    Args:
        models: The checkpoints: directories, hub ids such as `org/name@revision`, or `embedded`.
        chosen: the tasks.
        limit: Use only the first rows of each task, this many.
        num_fewshot: The number of examples in front of each question. By default it is that of the task; for the
            published seven it is 0.
        out: Write the results to this file (results.json).
        csv: Write the published CSV file into this folder: zeroshot_acc.csv for each model, with a row of tasks, one of
            metrics, and one of scores in percent.
        options: how it is run.

    Returns:
        One result for each checkpoint.

    Raises:
        ShortstackError: a checkpoint or a task's rows cannot be used; names file and row.
    """
    subjects = open_subjects("zeroshot", models, options, out, csv)
    plan = open_tasks(chosen, limit, num_fewshot, Progress(quiet=options.quiet))
    return evaluated(subjects, lambda subject: [subject_zeroshot(subject, plan)], out, csv)


@dataclass(frozen=True)
class TaskPlan:
    """What is asked of every model.

    Attributes:
        tasks: as the harness runs them.
        limit: the first so many rows.
        num_fewshot: as requested.
    """

    tasks: list[LoadedTask]
    limit: int | None
    num_fewshot: int | None


def open_tasks(chosen: TaskOptions, limit: int | None, num_fewshot: int | None, progress: Progress) -> TaskPlan:
    """Find the rows of every task, and say what was found.

    Raises:
        ShortstackError: an option means nothing, or a task's rows cannot be read.
    """
    tasks, tasks_dir = chosen.tasks, chosen.tasks_dir
    names = list(TASKS) if tasks is None else [name.strip() for name in tasks.split(",") if name.strip()]
    if not names or len(set(names)) != len(names):
        raise UsageError(f"--tasks {tasks!r}: expected names separated by commas, each once")
    if (limit is not None and limit < 1) or (num_fewshot is not None and num_fewshot < 0):
        raise UsageError(
            f"--limit {limit} --num-fewshot {num_fewshot}: expected at least 1 row, and at least 0 examples"
        )
    rows = {}
    if tasks_dir is not None:
        folder = Path(tasks_dir)
        if not folder.is_dir():
            raise UsageError(f"--tasks-dir {tasks_dir}: no such folder")
        unknown = [name for name in names if name not in TASKS]
        if unknown:
            raise UsageError(
                f"--tasks-dir: no local file format of {', '.join(unknown)} is known",
                hint=did_you_mean(unknown[0], TASKS),
            )
        for name in names:
            rows[name] = local_rows(name, folder, with_training=bool(num_fewshot))
            files = " and ".join(file.name for file in rows[name].files)
            progress.say(
                f"{name}: {len(rows[name].rows)} rows, {rows[name].form} form, {rows[name].files[0].parent}: {files}"
            )
    from shortstack.evaluation.harness import load_tasks

    return TaskPlan(load_tasks(names, rows, num_fewshot), limit, num_fewshot)


def subject_zeroshot(subject: Subject, plan: TaskPlan) -> Result:
    """All tasks on one checkpoint; what an earlier run has done of them is not done again."""
    from shortstack.evaluation.harness import HarnessModel, run_task

    lm = functools.cache(lambda: HarnessModel(subject))  # made when the first task is not there yet
    figures: dict[str, Figure] = {}
    per_item: dict[str, list[float]] = {}
    total = Usage()
    for loaded in plan.tasks:
        key = {
            "what": "zeroshot", "task": loaded.name, "version": loaded.version, "data": loaded.data["sha256"],
            "form": loaded.data["form"], "training": loaded.data.get("training_sha256"),
            "limit": plan.limit, "num_fewshot": plan.num_fewshot, "batch": subject.options.batch,
        }  # fmt: skip

        def run(loaded: LoadedTask = loaded) -> dict[str, Any]:
            subject.progress.say(f"{subject.name}: {loaded.name} ...")
            findings = run_task(lm(), loaded, limit=plan.limit)
            return {"figures": findings.figures, "per_row": findings.per_row}

        found, usage = subject.found(loaded.name, key, run)
        rows = min(plan.limit or loaded.data["rows"], loaded.data["rows"])
        own = TASKS[loaded.name].metric if loaded.name in TASKS else ""
        for metric in sorted(found["figures"], key=lambda metric: (metric != own, metric)):
            value, stderr = found["figures"][metric]
            unit = "accuracy" if metric.startswith("acc") or metric == "exact_match" else metric
            figures[f"{loaded.name} {metric}"] = Figure(value, stderr, unit, rows)
        per_item |= {f"{loaded.name} {metric}": values for metric, values in found["per_row"].items()}
        total = _sum_of(total, usage)
    if all(loaded.name in TASKS for loaded in plan.tasks):
        published = [f"{loaded.name} {TASKS[loaded.name].metric}" for loaded in plan.tasks]
        nothing = Figure(None, None, "accuracy", 0, "not measured")
        figures[MEAN] = mean_of({name: figures.get(name, nothing) for name in published})
    settings = {"limit": plan.limit, "num_fewshot": plan.num_fewshot, "softmax_dtype": "float32"}
    return subject.result(
        "zeroshot", total, data=_described(plan), settings=settings, figures=figures, per_item=per_item
    )


def _sum_of(one: Usage, other: Usage) -> Usage:
    devices = [usage.peak_device_bytes for usage in (one, other) if usage.peak_device_bytes is not None]
    return Usage(
        one.seconds + other.seconds, max(one.peak_rss_bytes, other.peak_rss_bytes), max(devices) if devices else None
    )


def _described(plan: TaskPlan) -> dict[str, Any]:
    """What a record says about all rows."""
    tasks = {loaded.name: loaded.data for loaded in plan.tasks}
    digest = hashlib.sha256(json_text({name: data["sha256"] for name, data in tasks.items()}, sort_keys=True).encode())
    names = list(tasks)
    source = "the seven published tasks" if names == list(TASKS) else ", ".join(names)
    return {
        "source": source + (f", the first {plan.limit} rows of each" if plan.limit else ""),
        "sha256": digest.hexdigest(), "rows": sum(data["rows"] for data in tasks.values()), "tasks": tasks,
    }  # fmt: skip


def check_tasks(values: Mapping[str, Any]) -> list[str]:
    """Look at the tasks' rows, before anything runs; lines about what could not be looked at.

    Raises:
        ShortstackError: the rows of a task cannot be used.
    """
    folder = values.get("tasks_dir")
    names = values["tasks"].split(",") if values.get("tasks") else list(TASKS)
    if folder is None:
        return [f"the rows of {', '.join(names)} come from the hub when they are needed"]
    if not Path(folder).is_dir():
        raise UsageError(f"tasks_dir {folder}: no such folder")
    for name in names:
        if name in TASKS:
            local_rows(name, Path(folder))
    return []
