"""lm-evaluation-harness through its Python API: its tasks, its prompts, its metrics; the forward passes are ours.

Nothing else imports lm_eval, which takes seconds. Only the sums of log-probabilities that the harness asks of a model are
computed by `logprobs.py`.
"""

from __future__ import annotations

import hashlib
import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import numpy as np
import yaml
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from shortstack.common.json_text import json_text, read_json
from shortstack.common.phases import is_watched
from shortstack.common.process_state import logging_at, same_random_state
from shortstack.engine.cpu import computing
from shortstack.errors import ShortstackError, UsageError, first_line
from shortstack.evaluation.evaluated_model import Subject
from shortstack.evaluation.logprobs import continuation_logprobs
from shortstack.evaluation.task_files import TASKS, LocalRows

_DEFINITIONS = Path(lm_eval.tasks.__file__).parent
_FEWSHOT_SEED = 1234  # the harness's own

_Request = tuple[Any, list[int], list[int]]


@dataclass(frozen=True)
class LoadedTask:
    """A task as the harness runs it.

    Attributes:
        name: what the user called it.
        task: the harness's object.
        version: of the definition.
        data: what a record says about its rows.
    """

    name: str
    task: Any
    version: str
    data: dict[str, Any]


@dataclass(frozen=True)
class TaskFindings:
    """What one model did on one task, row by row.

    Attributes:
        per_row: metric -> a value per row, in the order of the rows.
        figures: metric -> (value, standard error) as the harness aggregates them.
    """

    per_row: dict[str, list[float]]
    figures: dict[str, tuple[float, float | None]]


def load_tasks(names: Sequence[str], rows: dict[str, LocalRows], num_fewshot: int | None) -> list[LoadedTask]:
    """The harness's tasks, on rows from this disk where there are any, else on the hub's.

    Args:
        names: the published seven, or any other that the harness knows (a group gives all of its tasks).
        rows: of tasks that are read from this disk.
        num_fewshot: examples in front of each question; None leaves it to the task.

    Raises:
        ShortstackError: the harness knows no such task, or its rows cannot be read.
    """
    level = logging.INFO if is_watched() else logging.ERROR
    with same_random_state(), logging_at("lm_eval", level):
        return _loaded(names, rows, num_fewshot)


def _loaded(names: Sequence[str], rows: dict[str, LocalRows], num_fewshot: int | None) -> list[LoadedTask]:
    others = [name for name in names if name not in TASKS]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        manager = TaskManager(include_path=str(folder), include_defaults=bool(others))
        loaded: list[LoadedTask] = []
        for name in names:
            spec = _definition(name, rows.get(name), folder)
            for task_name, task in _asked(manager, name, spec).items():
                _set_fewshot(task, num_fewshot)
                data = rows[name].described() if name in rows else _hub_data(task)
                loaded.append(LoadedTask(task_name, task, str(task.VERSION), data))
    return loaded


def _asked(manager: TaskManager, name: str, spec: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = manager.load([spec])["tasks"]
    except Exception as error:  # the hub and its libraries fail in many ways
        if isinstance(error, KeyError) and name not in TASKS and name not in manager.all_tasks:
            known = ", ".join(TASKS)
            raise UsageError(
                f"--tasks {name}: the harness has no such task",
                hint=f"{known}, or a name that `lm-eval ls tasks` lists",
            ) from None
        raise ShortstackError(
            f"{name}: its rows cannot be downloaded from the hub ({first_line(error)})",
            hint="give --tasks-dir DIR with the files of the task, or try again later",
        ) from None
    return found


def _definition(name: str, rows: LocalRows | None, folder: Path) -> str:
    """What the harness loads: its own definition, or that one with its source of rows replaced."""
    if rows is None:
        return str(_DEFINITIONS / TASKS[name].definition) if name in TASKS else name
    form = TASKS[name]
    data = folder / f"{name}.json"
    data.write_text(json_text({form.split: rows.rows, **({"train": rows.training} if rows.training else {})}))
    config: dict[str, Any] = {
        "include": str(_DEFINITIONS / form.definition),
        "task": name,
        "dataset_path": "shortstack",
        "dataset_name": None,
        "dataset_kwargs": {"rows_file": str(data)},
        "training_split": "train" if rows.training else None,
        "validation_split": form.split if form.split == "validation" else None,
        "test_split": form.split if form.split == "test" else None,
    }
    if rows.form == "generic" and name == "hellaswag":
        config["process_docs"] = None  # it has been done: the row holds what it would make
    path = folder / f"{name}.yaml"
    # The one thing that plain YAML cannot say: a function of ours, by the harness's own tag.
    path.write_text(yaml.safe_dump(config) + f"custom_dataset: !function {__name__}.rows_as_dataset\n")
    return str(path)


def rows_as_dataset(*, rows_file: str, **_: Any) -> datasets.DatasetDict:
    """Rows that lie in a file, as the harness takes them; named by the definitions that `load_tasks` writes."""
    splits = read_json(Path(rows_file).read_bytes())
    return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in splits.items()})


def _set_fewshot(task: Any, asked: int | None) -> None:
    """As the harness's own entry does: a task that says 0 stays at 0."""
    own = task.get_config("num_fewshot")
    if asked is not None and own != 0:
        task.set_config(key="num_fewshot", value=asked)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_FEWSHOT_SEED)


def _hub_data(task: Any) -> dict[str, Any]:
    digest, rows = hashlib.sha256(), 0
    for doc in task.eval_docs:
        digest.update(json_text(doc, sort_keys=True, default=str).encode())
        rows += 1
    source = ":".join(filter(None, (task.DATASET_PATH, task.DATASET_NAME)))
    return {"source": source, "form": "hub", "sha256": digest.hexdigest(), "rows": rows}


def run_task(lm: HarnessModel, loaded: LoadedTask, *, limit: int | None) -> TaskFindings:
    """Run one task on one model, on all rows or the first `limit`.

    Raises:
        ShortstackError: a row's text has tokens that the model has no embedding for, or a log-likelihood is not finite.
    """
    task, subject = loaded.task, lm.subject
    with same_random_state(), computing(subject.dtype, subject.place):
        try:
            found = evaluate(lm, {"tasks": {loaded.name: task}}, limit=limit, bootstrap_iters=1000, log_samples=True)
        except _UnknownTokenError as error:
            row = next((i.doc_id for i in task.instances if error.text in "".join(map(str, i.args))), None)
            raise ShortstackError(
                f"{loaded.name}, row {'?' if row is None else row + 1}: token id {error.token}, but the embedding of "
                f"{subject.name} has {subject.rows} rows",
                hint="the tokenizer does not belong to this model",
            ) from None
    samples = sorted(found["samples"][loaded.name], key=lambda sample: sample["doc_id"])
    for sample in samples:
        if not all(map(math.isfinite, _numbers(sample["resps"]))):
            raise ShortstackError(
                f"{subject.name}: {loaded.name}, row {sample['doc_id'] + 1}: a log-likelihood is not finite",
                hint="use --dtype float32; if it fails too, the weights are damaged (shortstack check)",
            )
    figures, per_row = {}, {}
    for key, value in found["results"][loaded.name].items():
        metric, _, kind = key.partition(",")
        if kind != "none" or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        stderr = found["results"][loaded.name].get(f"{metric}_stderr,none")
        figures[metric] = (float(value), float(stderr) if isinstance(stderr, (int, float)) else None)
        values = [sample.get(metric) for sample in samples]
        if all(isinstance(value, (int, float, bool, np.number)) for value in values):
            per_row[metric] = [float(value) for value in values]
    if not figures:
        raise ShortstackError(f"{loaded.name}: the harness gives no plain figure for it", hint="remove it from --tasks")
    return TaskFindings(per_row, figures)


def _numbers(value: Any) -> Iterator[float]:
    """All numbers in nested lists."""
    if isinstance(value, (list, tuple)):
        for inner in value:
            yield from _numbers(inner)
    elif isinstance(value, float):
        yield value


class _UnknownTokenError(Exception):
    def __init__(self, text: str, token: int) -> None:
        super().__init__(text)
        self.text, self.token = text, token


class HarnessModel(HFLM):  # type: ignore[misc]
    """A subject as the harness's model of transformers, with log-probabilities of continuations by `logprobs.py`."""

    def __init__(self, subject: Subject) -> None:
        batch = subject.options.batch
        # It warns of every model that is loaded already, which is what it is given here.
        with logging_at("lm_eval", logging.ERROR):
            super().__init__(
                pretrained=subject.model,
                tokenizer=subject.tokenizer,
                batch_size=16 if batch == "auto" else batch,  # of tasks that generate
                max_length=subject.checkpoint.positions,
                device=str(subject.place),
                softmax_dtype="float32",
            )
        self.subject = subject

    def tok_encode(self, string: str, *arguments: Any, **named: Any) -> list[int]:
        """As the harness does; ids beyond the embedding are refused, with the text."""
        ids: list[int] = super().tok_encode(string, *arguments, **named)
        if ids and max(ids) >= self.subject.rows:
            raise _UnknownTokenError(string, max(ids))
        return ids

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """As the harness does, without its bars: `progress` shows ours."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: list[_Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        batch = self.subject.options.batch
        with self.subject.progress.bar("requests", len(requests)) as advance:
            return continuation_logprobs(
                self.model,
                [(context, continuation) for _, context, continuation in requests],
                max_length=self.max_length,
                device=self.device,
                batch=None if batch == "auto" else batch,
                advance=advance,
            )
