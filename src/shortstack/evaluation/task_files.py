"""The seven published zero-shot tasks: which figure counts, and their rows from files on this disk.

A task's own published files become rows of the very form that the hub's copy has, so that the harness's own definition of
the task (prompt, choices, target, preprocessing) runs on them unchanged. The generic form (`query`, `choices`, `gold`)
is turned into the same rows, and only where a task's preprocessing has been done already it is not done again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from shortstack.common.json_text import json_text
from shortstack.data.sources import Budget, file_rows
from shortstack.errors import ShortstackError
from shortstack.evaluation import task_rows
from shortstack.evaluation.task_rows import Row, RowError, text_field, text_list

Form = Literal["published", "generic"]
_GENERIC = ("query", "choices", "gold")


@dataclass(frozen=True)
class TaskForm:
    """One task: how it is scored and what its files hold.

    Attributes:
        metric: the published one.
        definition: the harness's own file that defines it, below its tasks.
        split: the one that the harness evaluates.
        files: the published file of that split, by its usual names.
        training: the published training file, for examples in the prompt.
        labels: the name of the file of labels that goes with a file of rows, as (end of its name, end of the labels').
        convert: a published row -> the hub's row; the second argument is the label's line, where there is such a file.
        generic: (prompt, choices, right choice) -> the hub's row.
    """

    metric: str
    definition: str
    split: str
    files: tuple[str, ...]
    training: tuple[str, ...]
    convert: Callable[[Row, str | None], Row]
    generic: Callable[[str, list[str], int], Row]
    labels: tuple[str, str] | None = None


@dataclass(frozen=True)
class LocalRows:
    """The rows of a task that were found on this disk.

    Attributes:
        files: what was read.
        form: the task's own published form, or the generic one.
        sha256: of the files' bytes.
        rows, training: in the hub's form.
    """

    files: tuple[Path, ...]
    form: Form
    sha256: str
    rows: list[Row] = field(repr=False)
    training: list[Row] = field(default_factory=list, repr=False)

    def described(self) -> dict[str, Any]:
        """What a record says about them."""
        names = ", ".join(str(file) for file in self.files)
        found = {"source": names, "form": self.form, "sha256": self.sha256, "rows": len(self.rows)}
        if self.training:  # examples from here stand in the prompts
            rows = json_text(self.training, sort_keys=True).encode()
            found["training_sha256"] = hashlib.sha256(rows).hexdigest()
        return found


def local_rows(task: str, folder: Path, *, with_training: bool = False) -> LocalRows:
    """The rows of a task below a folder: the published file of the split that the harness evaluates, else a generic one.

    Args:
        task: one of `TASKS`.
        folder: with a sub-folder per task, or the files themselves.
        with_training: read the published training file, too.

    Raises:
        ShortstackError: nothing there, an empty file, a file of another task, or a row that cannot be right (named).
    """
    form = TASKS[task]
    training: list[Row] = []
    if with_training:
        examples = _first(task, folder, form.training)
        if examples is None:
            raise ShortstackError(
                f"{folder}: no training rows of {task} for examples in the prompt ({', '.join(form.training)})",
                hint="put the file there, or --num-fewshot 0",
            )
        training = _published(form, examples)[0]
    file = _first(task, folder, form.files)
    if file is not None and not _is_generic(file, if_empty=False):
        rows, files = _published(form, file)
        return LocalRows(files, "published", _sha256(files), rows, training)
    file = _generic_file(task, folder)
    if file is None:
        raise ShortstackError(
            f"{folder}: no rows of {task} (looked for {task}/{form.files[0]} and for a .jsonl of query, choices, gold)",
            hint=f"put its file there, leave {task} out of --tasks, or leave --tasks-dir out to get it from the hub",
        )
    rows = _read(file, lambda row: _from_generic(form, row))
    return LocalRows((file,), "generic", _sha256([file]), rows, training)


def _first(task: str, folder: Path, names: Sequence[str]) -> Path | None:
    """The first of some files: in the task's own folder, else beside those of the others if its name says which it is."""
    places = [folder / task / name for name in names] + [folder / name for name in names if _is_telling(name)]
    return next((place for place in places if place.is_file()), None)


def _is_telling(name: str) -> bool:
    return any(word in name.lower() for word in ("arc-", "hellaswag", "winogrande", "piqa", "boolq", "openbookqa"))


def _generic_file(task: str, folder: Path) -> Path | None:
    own = sorted((folder / task).glob("*.jsonl")) if (folder / task).is_dir() else []
    others = [folder / f"{task}.jsonl", *sorted(folder.glob(f"*/{task}.jsonl"))]
    return next((file for file in (*own, *others) if file.is_file() and _is_generic(file, if_empty=True)), None)


def _is_generic(file: Path, *, if_empty: bool) -> bool:
    """Whether the first row has the generic form."""
    for _, row in file_rows(file, Budget(1)):
        return isinstance(row, dict) and all(key in row for key in _GENERIC)
    return if_empty


def _published(form: TaskForm, file: Path) -> tuple[list[Row], tuple[Path, ...]]:
    """(rows in the hub's form, the files that were read)."""
    labels_file = None
    if form.labels is not None:
        end, labels_end = form.labels
        labels_file = file.with_name(file.name.removesuffix(end) + labels_end)
    if labels_file is None or not labels_file.is_file():
        return _read(file, lambda row: form.convert(row, None)), (file,)
    labels = labels_file.read_text(encoding="utf-8").split()
    left = iter(labels)
    rows = _read(file, lambda row: form.convert(row, next(left, "")))
    if len(rows) != len(labels):
        raise ShortstackError(
            f"{labels_file}: {len(labels)} labels for the {len(rows)} rows of {file.name}", hint="get both files again"
        )
    return rows, (file, labels_file)


def _read(file: Path, convert: Callable[[Row], Row]) -> list[Row]:
    rows = []
    for place, row in file_rows(file):
        if not isinstance(row, dict):
            raise ShortstackError(f"{file}, {place}: expected an object, found {type(row).__name__}")
        try:
            rows.append(convert(row))
        except RowError as error:
            raise ShortstackError(f"{file}, {place}: {error}", hint="is this the file of another task?") from None
    if not rows:
        raise ShortstackError(f"{file}: no rows", hint="get the file again")
    return rows


def _sha256(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _from_generic(form: TaskForm, row: Row) -> Row:
    query, choices, gold = text_field(row, "query"), text_list(row, "choices"), row.get("gold")
    if type(gold) is not int or not 0 <= gold < len(choices):
        raise RowError(f"gold is {gold!r:.40}, expected a choice from 0 to {len(choices) - 1}")
    return form.generic(query, choices, gold)


# In the order of the published tables.
TASKS: dict[str, TaskForm] = {
    "boolq": TaskForm(
        "acc", "super_glue/boolq/default.yaml", "validation", ("val.jsonl", "validation.jsonl", "dev.jsonl"),
        ("train.jsonl",), task_rows.boolq, task_rows.generic_boolq,
    ),
    "piqa": TaskForm(
        "acc", "piqa/piqa.yaml", "validation", ("valid.jsonl", "validation.jsonl"), ("train.jsonl",), task_rows.piqa,
        task_rows.generic_piqa, (".jsonl", "-labels.lst"),
    ),
    "hellaswag": TaskForm(
        "acc_norm", "hellaswag/hellaswag.yaml", "validation", ("hellaswag_val.jsonl", "val.jsonl", "validation.jsonl"),
        ("hellaswag_train.jsonl", "train.jsonl"), task_rows.hellaswag, task_rows.generic_hellaswag,
    ),
    "winogrande": TaskForm(
        "acc", "winogrande/default.yaml", "validation", ("dev.jsonl", "validation.jsonl"),
        ("train_xl.jsonl", "train_l.jsonl", "train_m.jsonl", "train_s.jsonl", "train_xs.jsonl"), task_rows.winogrande,
        task_rows.generic_winogrande, (".jsonl", "-labels.lst"),
    ),
    "arc_easy": TaskForm(
        "acc", "arc/arc_easy.yaml", "test", ("ARC-Easy-Test.jsonl", "test.jsonl"),
        ("ARC-Easy-Train.jsonl", "train.jsonl"), task_rows.arc, task_rows.generic_arc,
    ),
    "arc_challenge": TaskForm(
        "acc_norm", "arc/arc_challenge.yaml", "test", ("ARC-Challenge-Test.jsonl", "test.jsonl"),
        ("ARC-Challenge-Train.jsonl", "train.jsonl"), task_rows.arc, task_rows.generic_arc,
    ),
    "openbookqa": TaskForm(
        "acc_norm", "openbookqa/openbookqa.yaml", "test", ("test.jsonl",), ("train.jsonl",), task_rows.openbookqa,
        task_rows.generic_openbookqa,
    ),
}  # fmt: skip
