"""A few rows of each zero-shot task in all its forms: published files, the hub's rows, and query/choices/gold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]

BOOLQ = [
    ("is the sky blue", "Sky -- The sky looks blue by day.", True),
    ("can stones swim", "Stone -- A stone sinks in water.", False),
    ("do birds sing", "Birds -- Many birds sing in spring.", True),
    ("is ice warm", "Ice -- Ice is frozen water.", False),
]
PIQA = [
    ("open a jar", "turn the lid", "eat the lid", 0),
    ("dry a plate", "pour water on it", "wipe it with a towel", 1),
    ("cut bread", "use a knife", "use a spoon", 0),
    ("light a room", "close the curtain", "switch on the lamp", 1),
]
HELLASWAG = [
    (
        "Cooking",
        "A man stands in a kitchen.",
        "he",
        ["cuts an onion.", "flies away.", "sleeps [title] deep.", "is blue."],
        0,
    ),
    ("Swimming", "A girl jumps into a pool.", "she", ["reads.", "swims to the edge.", "cooks.", "paints."], 1),
    ("Running", "Two people run.", "they", ["melt.", "sing.", "reach the end.", "fold."], 2),
    ("Reading", "A boy opens a book.", "the boy", ["eats it.", "drives.", "jumps.", "turns a page."], 3),
]
WINOGRANDE = [
    ("Ann gave Eve a book because _ liked to read.", "Eve", "Ann", 1),
    ("The cup did not fit into the box, so _ was too small.", "cup", "box", 2),
    ("Tom asked Ben for help, and _ came at once.", "Tom", "Ben", 2),
    ("The fox ran from the dog because _ was afraid.", "fox", "dog", 1),
]
QUESTIONS = [
    ("Which of these is a planet?", ["Mars", "Moon", "Sun", "Comet"], 0),
    ("What do plants need?", ["sand", "light", "wind", "noise"], 1),
    ("Ice is", ["hot", "loud", "solid", "alive"], 2),
    ("A fish breathes with", ["lungs", "skin", "leaves", "gills"], 3),
]


def lettered(choices: list[str]) -> Row:
    return {"text": choices, "label": ["A", "B", "C", "D"][: len(choices)]}


def hub_rows() -> dict[str, list[Row]]:
    """As the hub's copies have them."""
    questions = [(q, lettered(choices), "ABCD"[gold]) for q, choices, gold in QUESTIONS]
    return {
        "boolq": [{"question": q, "passage": p, "label": int(label)} for q, p, label in BOOLQ],
        "piqa": [{"goal": g, "sol1": a, "sol2": b, "label": label} for g, a, b, label in PIQA],
        "hellaswag": [
            {"activity_label": activity, "ctx_a": a, "ctx_b": b, "endings": endings, "label": str(label)}
            for activity, a, b, endings, label in HELLASWAG
        ],
        "winogrande": [
            {"sentence": s, "option1": a, "option2": b, "answer": str(answer)} for s, a, b, answer in WINOGRANDE
        ],
        "arc_easy": [{"question": q, "choices": c, "answerKey": key} for q, c, key in questions],
        "arc_challenge": [{"question": q, "choices": c, "answerKey": key} for q, c, key in reversed(questions)],
        "openbookqa": [{"question_stem": q, "choices": c, "answerKey": key} for q, c, key in questions],
    }


def lines(path: Path, rows: list[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def published(folder: Path) -> Path:
    """The published files of all seven tasks, in a folder each."""
    rows = hub_rows()

    def nested(row: Row, question: str) -> Row:
        pairs = zip(row["choices"]["text"], row["choices"]["label"], strict=True)
        choices = [{"text": text, "label": label} for text, label in pairs]
        return {"id": "1", "question": {"stem": row[question], "choices": choices}, "answerKey": row["answerKey"]}

    lines(folder / "boolq/val.jsonl", [{**row, "label": bool(row["label"])} for row in rows["boolq"]])
    lines(folder / "piqa/valid.jsonl", [{key: row[key] for key in ("goal", "sol1", "sol2")} for row in rows["piqa"]])
    (folder / "piqa/valid-labels.lst").write_text("".join(f"{row['label']}\n" for row in rows["piqa"]))
    lines(folder / "hellaswag/hellaswag_val.jsonl", [{**r, "label": int(r["label"])} for r in rows["hellaswag"]])
    lines(folder / "winogrande/dev.jsonl", rows["winogrande"])
    (folder / "winogrande/dev-labels.lst").write_text("".join(f"{row['answer']}\n" for row in rows["winogrande"]))
    lines(folder / "arc_easy/ARC-Easy-Test.jsonl", [nested(row, "question") for row in rows["arc_easy"]])
    lines(folder / "arc_challenge/ARC-Challenge-Test.jsonl", [nested(row, "question") for row in rows["arc_challenge"]])
    lines(folder / "openbookqa/test.jsonl", [nested(row, "question_stem") for row in rows["openbookqa"]])
    return folder


def generic(folder: Path) -> Path:
    """The same rows as query, choices and gold, HellaSwag's preprocessed as its copies are."""
    questions = [{"query": f"Question: {q}", "choices": choices, "gold": gold} for q, choices, gold in QUESTIONS]
    lines(folder / "boolq.jsonl", [
        {"query": f"Passage: {p}\nQuestion: {q}?\nAnswer:", "choices": ["no", "yes"], "gold": int(label)}
        for q, p, label in BOOLQ
    ])  # fmt: skip
    lines(folder / "piqa.jsonl", [{"query": g, "choices": [a, b], "gold": label} for g, a, b, label in PIQA])
    lines(folder / "hellaswag/first.jsonl", [
        {
            "query": f"{activity}: {a} {b.capitalize()}",
            "choices": [ending.replace(" [title]", ". ").replace("  ", " ") for ending in endings],
            "gold": label,
        }
        for activity, a, b, endings, label in HELLASWAG
    ])  # fmt: skip
    lines(folder / "winogrande.jsonl", [
        {"query": s, "choices": [a, b], "gold": answer - 1} for s, a, b, answer in WINOGRANDE
    ])  # fmt: skip
    lines(folder / "others/arc_easy.jsonl", questions)
    lines(folder / "others/arc_challenge.jsonl", questions[::-1])
    lines(folder / "openbookqa.jsonl", [{"query": q, "choices": c, "gold": g} for q, c, g in QUESTIONS])
    return folder


def prompts_by_hand() -> dict[str, list[list[tuple[str, str]]]]:
    """For each task and row, (context, continuation) of each choice, written out from the published prompts."""
    reversed_questions = QUESTIONS[::-1]
    return {
        "boolq": [[(f"{p}\nQuestion: {q}?\nAnswer:", f" {word}") for word in ("no", "yes")] for q, p, _ in BOOLQ],
        "piqa": [[(f"Question: {g}\nAnswer:", f" {end}") for end in (a, b)] for g, a, b, _ in PIQA],
        "hellaswag": [
            [
                (f"{activity}: {a} {b.capitalize()}", " " + ending.replace(" [title]", ". ").replace("  ", " "))
                for ending in endings
            ]
            for activity, a, b, endings, _ in HELLASWAG
        ],
        "winogrande": [
            [(s.split("_")[0] + option, " " + s.split("_")[1].strip()) for option in (a, b)]
            for s, a, b, _ in WINOGRANDE
        ],
        "arc_easy": [[(f"Question: {q}\nAnswer:", f" {c}") for c in choices] for q, choices, _ in QUESTIONS],
        "arc_challenge": [
            [(f"Question: {q}\nAnswer:", f" {c}") for c in choices] for q, choices, _ in reversed_questions
        ],
        "openbookqa": [[(q, f" {c}") for c in choices] for q, choices, _ in QUESTIONS],
    }


def right_choices() -> dict[str, list[int]]:
    questions = [gold for _, _, gold in QUESTIONS]
    return {
        "boolq": [int(label) for _, _, label in BOOLQ], "piqa": [row[3] for row in PIQA],
        "hellaswag": [row[4] for row in HELLASWAG], "winogrande": [row[3] - 1 for row in WINOGRANDE],
        "arc_easy": questions, "arc_challenge": questions[::-1], "openbookqa": questions,
    }  # fmt: skip
