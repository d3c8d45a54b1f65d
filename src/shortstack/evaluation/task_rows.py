"""One row of a zero-shot task, as it was published or as query, choices and gold -> the row that the hub's copy has."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


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


_BOOLQ_PROMPT = re.compile(r"(?:Passage: )?(?P<passage>.*)\nQuestion: (?P<question>.*?)\??(?:\nAnswer:)?", re.DOTALL)


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
        raise RowError(f"answer is {answer}, the file of labels says {label.strip()}")
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
