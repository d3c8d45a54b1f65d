"""Rows of the zero-shot tasks from files: every form gives the hub's rows, and what is wrong is named by file and row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shortstack.errors import ShortstackError
from shortstack.evaluation.task_files import TASKS, local_rows
from tests.evaluation import material


@pytest.mark.parametrize("task", TASKS)
def test_published_files_become_the_hubs_rows(task: str, tmp_path: Path) -> None:
    found = local_rows(task, material.published(tmp_path))
    assert found.form == "published"
    assert found.rows == material.hub_rows()[task]
    assert all(file.is_file() for file in found.files)
    assert len(found.files) == (2 if task in ("piqa", "winogrande") else 1)


@pytest.mark.parametrize("task", TASKS)
def test_the_generic_form_becomes_the_same_rows(task: str, tmp_path: Path) -> None:
    found = local_rows(task, material.generic(tmp_path))
    assert found.form == "generic"
    expected = material.hub_rows()[task]
    if task == "hellaswag":  # preprocessed already
        assert [row["gold"] for row in found.rows] == [int(row["label"]) for row in expected]
        assert found.rows[0]["query"] == "Cooking: A man stands in a kitchen. He"
    else:
        assert found.rows == expected


def test_the_published_file_comes_first(tmp_path: Path) -> None:
    material.generic(tmp_path)
    assert local_rows("arc_easy", tmp_path).form == "generic"
    material.published(tmp_path)
    assert local_rows("arc_easy", tmp_path).form == "published"


def test_files_whose_names_say_what_they_are_need_no_folder(tmp_path: Path) -> None:
    material.published(tmp_path / "all")
    (tmp_path / "all/arc_easy/ARC-Easy-Test.jsonl").rename(tmp_path / "ARC-Easy-Test.jsonl")
    assert len(local_rows("arc_easy", tmp_path).rows) == 4
    (tmp_path / "all/openbookqa/test.jsonl").rename(tmp_path / "test.jsonl")
    with pytest.raises(ShortstackError, match=r"no rows of openbookqa \(searched for openbookqa/test.jsonl"):
        local_rows("openbookqa", tmp_path)


def test_boolq_of_the_first_publication_keeps_titles_apart(tmp_path: Path) -> None:
    row = {"question": "is it", "title": "Sky", "answer": True, "passage": "The sky."}
    material.lines(tmp_path / "boolq/dev.jsonl", [row])
    assert local_rows("boolq", tmp_path).rows == [{"question": "is it", "passage": "Sky -- The sky.", "label": 1}]


def changed(**fields: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda row: {**row, **fields}


WRONG = {
    "boolq": (changed(label="maybe"), "label is 'maybe', expected true or false"),
    "hellaswag": (changed(label=4), "label is 4, expected one of 0, 1, 2, 3"),
    "winogrande": (changed(answer="3"), "answer is '3', expected one of 1, 2"),
    "arc_easy": (changed(answerKey="E"), "answerKey is 'E', expected one of A, B, C, D"),
    "arc_challenge": (changed(answerKey="1"), "answerKey is '1', expected one of A, B, C, D"),
    "openbookqa": (changed(answerKey=""), "answerKey is '', expected one of A, B, C, D"),
}


@pytest.mark.parametrize("task", WRONG)
def test_a_label_out_of_range_names_the_row(task: str, tmp_path: Path) -> None:
    (file, *_) = local_rows(task, material.published(tmp_path)).files
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    change, message = WRONG[task]
    material.lines(file, [*rows[:2], change(rows[2]), rows[3]])
    with pytest.raises(ShortstackError) as raised:
        local_rows(task, tmp_path)
    assert raised.value.message == f"{file}, line 3: {message}"


def test_labels_in_a_file_of_their_own(tmp_path: Path) -> None:
    labels = material.published(tmp_path) / "piqa/valid-labels.lst"
    labels.write_text("0\n1\n2\n1\n")
    with pytest.raises(ShortstackError, match="line 3: label is '2', expected one of 0, 1"):
        local_rows("piqa", tmp_path)
    labels.write_text("0\n1\n0\n1\n0\n")
    with pytest.raises(ShortstackError, match="5 labels for the 4 rows of valid.jsonl"):
        local_rows("piqa", tmp_path)
    (tmp_path / "winogrande/dev-labels.lst").write_text("1\n2\n1\n1\n")
    with pytest.raises(ShortstackError, match="line 3: answer is 2, the file of labels has 1"):
        local_rows("winogrande", tmp_path)


@pytest.mark.parametrize("gold", [-1, 4, "0", None, 1.0])
def test_gold_out_of_range(gold: Any, tmp_path: Path) -> None:
    material.lines(tmp_path / "arc_easy.jsonl", [{"query": "q", "choices": list("abcd"), "gold": gold}])
    with pytest.raises(ShortstackError, match="line 1: gold is .* expected a choice from 0 to 3"):
        local_rows("arc_easy", tmp_path)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("other", TASKS)
def test_a_file_of_another_task_is_refused(task: str, other: str, tmp_path: Path) -> None:
    if other == task or {task, other} == {"arc_easy", "arc_challenge"}:
        return
    same_form = {"arc_easy", "arc_challenge", "openbookqa"}
    if {task, other} <= same_form:
        return  # one form: nothing in a row says which of them it is
    (source, *_) = local_rows(other, material.published(tmp_path / "all")).files
    target = tmp_path / "mixed" / task / TASKS[task].files[0]
    target.parent.mkdir(parents=True)
    target.write_bytes(source.read_bytes())
    with pytest.raises(ShortstackError) as raised:
        local_rows(task, tmp_path / "mixed")
    assert f"{target}, line 1: " in raised.value.message
    assert raised.value.hint == "check that the file belongs to this task"


def test_an_empty_file(tmp_path: Path) -> None:
    material.published(tmp_path)
    (tmp_path / "boolq/val.jsonl").write_text("\n")
    with pytest.raises(ShortstackError, match=r"boolq/val\.jsonl: no rows"):
        local_rows("boolq", tmp_path)


def test_examples_for_the_prompt_come_from_the_training_file(tmp_path: Path) -> None:
    material.published(tmp_path)
    with pytest.raises(ShortstackError, match="no training rows of winogrande"):
        local_rows("winogrande", tmp_path, with_training=True)
    material.lines(tmp_path / "winogrande/train_xs.jsonl", material.hub_rows()["winogrande"][:2])
    assert len(local_rows("winogrande", tmp_path, with_training=True).training) == 2


def test_the_real_files(shared: Path) -> None:
    forms = {task: local_rows(task, shared / "data/tasks") for task in TASKS}
    assert {task: (found.form, len(found.rows)) for task, found in forms.items()} == {
        "boolq": ("published", 3270), "piqa": ("published", 1838), "hellaswag": ("generic", 2000),
        "winogrande": ("published", 1267), "arc_easy": ("generic", 2376), "arc_challenge": ("published", 1150),
        "openbookqa": ("published", 500),
    }  # fmt: skip
