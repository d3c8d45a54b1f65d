"""The seven published zero-shot tasks: which figure counts, and their rows from local files.

A task's own published files become rows of the very form that the hub's copy has, so that the harness's own definition of
the task (prompt, choices, target, preprocessing) runs on them unchanged. The generic form (`query`, `choices`, `gold`)
is turned into the same rows, and only where a task's preprocessing has been done already it is not done again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from shortstack.common.json_text import json_text
from shortstack.data.json_rows import Budget
from shortstack.data.sources import file_rows
from shortstack.errors import ShortstackError

Row = dict[str, Any]
_BOOLQ_PROMPT = re.compile(r"(?:Passage: )?(?P<passage>.*)\nQuestion: (?P<question>.*?)\??(?:\nAnswer:)?", re.DOTALL)
Form = Literal["published", "generic"]
_GENERIC = ("query", "choices", "gold")
# Parts of file names that say which task it is.
_TELLING = ("arc-", "hellaswag", "winogrande", "piqa", "boolq", "openbookqa")


class RowError(ValueError):
    """What is wrong with one row; the file and the row are named by the caller."""


def text_field(row: Row, *names: str) -> str:
    """The first of some fields that is there, a string."""
    for name in names:
        if name in row:
            if not isinstance(row[name], str) or not row[name].strip():
                raise RowError(f"{name} is {row[name]!r:.60}, expected text")
            return str(row[name])
    raise RowError(f"expected {' or '.join(names)} (found: {', '.join(map(str, row)) or 'nothing'})")


def text_list(row: Row, name: str) -> list[str]:
    """A field that is a list of at least two strings."""
    found = row.get(name)
    if not isinstance(found, list) or len(found) < 2 or not all(isinstance(text, str) for text in found):
        raise RowError(f"{name} is {found!r:.60}, expected a list of at least two texts")
    return found


def _label(value: Any, known: Sequence[str], name: str) -> str:
    """A label in its written form, one of those that exist."""
    text = str(value).strip()
    if isinstance(value, float) or text not in known:
        raise RowError(f"{name} is {value!r:.40}, expected one of {', '.join(known)}")
    return text


def _question(query: str) -> str:
    """The question itself, out of the frame that several forms put around it."""
    return query.removeprefix("Question: ").removesuffix("\nAnswer:").strip()


def _lettered(choices: Sequence[str]) -> Row:
    return {"text": list(choices), "label": [chr(ord("A") + number) for number in range(len(choices))]}


def _pair(choices: Sequence[str]) -> Sequence[str]:
    if len(choices) != 2:
        raise RowError(f"{len(choices)} choices, expected 2")
    return choices


# ---- BoolQ


def boolq(row: Row, _: str | None) -> Row:
    """SuperGLUE's form, or that of the first publication -> the hub's row."""
    passage, label = text_field(row, "passage"), row.get("label", row.get("answer"))
    if type(label) is not bool and (type(label) is not int or label not in (0, 1)):
        raise RowError(f"label is {label!r:.40}, expected true or false")
    if "title" in row:  # the first published form keeps apart what SuperGLUE's joins
        passage = f"{text_field(row, 'title')} -- {passage}"
    return {"question": text_field(row, "question"), "passage": passage, "label": int(label)}


def generic_boolq(query: str, choices: list[str], gold: int) -> Row:
    """Prompt, choices and the right one -> the hub's row."""
    match = _BOOLQ_PROMPT.fullmatch(query.strip())
    if match is None or [choice.strip().lower() for choice in _pair(choices)] not in (["no", "yes"], ["yes", "no"]):
        raise RowError("expected a passage, a line 'Question: ...', and the choices no and yes")
    return {**match.groupdict(), "label": int(choices[gold].strip().lower() == "yes")}


# ---- PIQA


def piqa(row: Row, label: str | None) -> Row:
    """A row and its line in the file of labels -> the hub's row."""
    known = _label(row.get("label") if label is None else label, ("0", "1"), "label")
    return {
        "goal": text_field(row, "goal"),
        "sol1": text_field(row, "sol1"),
        "sol2": text_field(row, "sol2"),
        "label": int(known),
    }


def generic_piqa(query: str, choices: list[str], gold: int) -> Row:
    """Prompt, choices and the right one -> the hub's row."""
    first, second = _pair(choices)
    return {"goal": _question(query), "sol1": first, "sol2": second, "label": gold}


# ---- WinoGrande


def winogrande(row: Row, label: str | None) -> Row:
    """A row, whose answer the file of labels repeats -> the hub's row."""
    sentence = text_field(row, "sentence")
    if sentence.count("_") < 1:
        raise RowError("sentence has no blank (_)")
    answer = _label(row["answer"] if row.get("answer") else label, ("1", "2"), "answer")
    if label is not None and label.strip() != answer:
        raise RowError(f"answer is {answer}, the file of labels has {label.strip()}")
    return {
        "sentence": sentence, "option1": text_field(row, "option1"), "option2": text_field(row, "option2"), "answer": answer
    }  # fmt: skip


def generic_winogrande(query: str, choices: list[str], gold: int) -> Row:
    """Prompt, choices and the right one -> the hub's row."""
    first, second = _pair(choices)
    return winogrande({"sentence": query, "option1": first, "option2": second, "answer": str(gold + 1)}, None)


# ---- ARC and OpenBookQA


def _choices(row: Row) -> tuple[str, Row, str]:
    """(question, choices, key), from the form of AllenAI's files or from the hub's."""
    question, choices = row.get("question", row.get("question_stem")), row.get("choices")
    if isinstance(question, dict):
        choices = question.get("choices")
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise RowError("question has no list of choices")
        choices = {key: [choice.get(key) for choice in choices] for key in ("text", "label")}
        question = question.get("stem")
    if not isinstance(question, str) or not isinstance(choices, dict) or "answerKey" not in row:
        raise RowError(
            f"expected question with choices, and answerKey (found: {', '.join(map(str, row)) or 'nothing'})"
        )
    labels = text_list(choices, "label")
    if len(text_list(choices, "text")) != len(labels):
        raise RowError(f"{len(choices['text'])} choices with {len(labels)} labels")
    return question, choices, _label(row["answerKey"], labels, "answerKey")


def arc(row: Row, _: str | None) -> Row:
    """AllenAI's form, or the hub's -> the hub's row."""
    question, choices, key = _choices(row)
    return {"question": question, "choices": choices, "answerKey": key}


def generic_arc(query: str, choices: list[str], gold: int) -> Row:
    """Prompt, choices and the right one -> the hub's row."""
    lettered = _lettered(choices)
    return {"question": _question(query), "choices": lettered, "answerKey": lettered["label"][gold]}


def openbookqa(row: Row, _: str | None) -> Row:
    """AllenAI's form, or the hub's -> the hub's row."""
    question, choices, key = _choices(row)
    return {"question_stem": question, "choices": choices, "answerKey": key}


def generic_openbookqa(query: str, choices: list[str], gold: int) -> Row:
    """Prompt, choices and the right one -> the hub's row."""
    lettered = _lettered(choices)
    return {"question_stem": query, "choices": lettered, "answerKey": lettered["label"][gold]}


# ---- HellaSwag


def hellaswag(row: Row, _: str | None) -> Row:
    """The published form -> the hub's row."""
    endings = text_list(row, "endings")
    if not isinstance(row.get("ctx_b"), str):
        raise RowError(f"ctx_b is {row.get('ctx_b')!r:.40}, expected text")
    known = [str(number) for number in range(len(endings))]
    return {
        "activity_label": text_field(row, "activity_label"), "ctx_a": text_field(row, "ctx_a"), "ctx_b": row["ctx_b"],
        "endings": endings, "label": _label(row.get("label"), known, "label"),
    }  # fmt: skip


def generic_hellaswag(query: str, choices: list[str], gold: int) -> Row:
    """Prompt, choices and the right one -> the hub's row."""
    return {"query": query, "choices": choices, "gold": gold, "label": str(gold)}


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
    """The rows of a task that were found in local files.

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
                hint="put the file there, or use --num-fewshot 0",
            )
        training = _published(form, examples)[0]
    file = _first(task, folder, form.files)
    if file is not None and not _is_generic(file, if_empty=False):
        rows, files = _published(form, file)
        return LocalRows(files, "published", _sha256(files), rows, training)
    own = sorted((folder / task).glob("*.jsonl")) if (folder / task).is_dir() else []
    others = [folder / f"{task}.jsonl", *sorted(folder.glob(f"*/{task}.jsonl"))]
    file = next((file for file in (*own, *others) if file.is_file() and _is_generic(file, if_empty=True)), None)
    if file is None:
        raise ShortstackError(
            f"{folder}: no rows of {task} (searched for {task}/{form.files[0]} and for a .jsonl of query, choices, gold)",
            hint=f"put its file there, leave {task} out of --tasks, or leave --tasks-dir out to get it from the hub",
        )
    rows = _read(file, lambda row: _from_generic(form, row))
    return LocalRows((file,), "generic", _sha256([file]), rows, training)


def _first(task: str, folder: Path, names: Sequence[str]) -> Path | None:
    """The first of some files: in the task's own folder, else beside those of the others if its name says which it is."""
    telling = [name for name in names if any(word in name.lower() for word in _TELLING)]
    paths = [folder / task / name for name in names] + [folder / name for name in telling]
    return next((path for path in paths if path.is_file()), None)


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
            f"{labels_file}: {len(labels)} labels for the {len(rows)} rows of {file.name}",
            hint="download both files again",
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
            raise ShortstackError(
                f"{file}, {place}: {error}", hint="check that the file belongs to this task"
            ) from None
    if not rows:
        raise ShortstackError(f"{file}: no rows", hint="download the file again")
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


MEAN = "AVE"  # of all tasks, as the published tables call it
# In the order of the published tables.
TASKS: dict[str, TaskForm] = {
    "boolq": TaskForm(
        "acc", "super_glue/boolq/default.yaml", "validation", ("val.jsonl", "validation.jsonl", "dev.jsonl"),
        ("train.jsonl",), boolq, generic_boolq,
    ),
    "piqa": TaskForm(
        "acc", "piqa/piqa.yaml", "validation", ("valid.jsonl", "validation.jsonl"), ("train.jsonl",), piqa,
        generic_piqa, (".jsonl", "-labels.lst"),
    ),
    "hellaswag": TaskForm(
        "acc_norm", "hellaswag/hellaswag.yaml", "validation", ("hellaswag_val.jsonl", "val.jsonl", "validation.jsonl"),
        ("hellaswag_train.jsonl", "train.jsonl"), hellaswag, generic_hellaswag,
    ),
    "winogrande": TaskForm(
        "acc", "winogrande/default.yaml", "validation", ("dev.jsonl", "validation.jsonl"),
        ("train_xl.jsonl", "train_l.jsonl", "train_m.jsonl", "train_s.jsonl", "train_xs.jsonl"), winogrande,
        generic_winogrande, (".jsonl", "-labels.lst"),
    ),
    "arc_easy": TaskForm(
        "acc", "arc/arc_easy.yaml", "test", ("ARC-Easy-Test.jsonl", "test.jsonl"),
        ("ARC-Easy-Train.jsonl", "train.jsonl"), arc, generic_arc,
    ),
    "arc_challenge": TaskForm(
        "acc_norm", "arc/arc_challenge.yaml", "test", ("ARC-Challenge-Test.jsonl", "test.jsonl"),
        ("ARC-Challenge-Train.jsonl", "train.jsonl"), arc, generic_arc,
    ),
    "openbookqa": TaskForm(
        "acc_norm", "openbookqa/openbookqa.yaml", "test", ("test.jsonl",), ("train.jsonl",), openbookqa,
        generic_openbookqa,
    ),
}  # fmt: skip
