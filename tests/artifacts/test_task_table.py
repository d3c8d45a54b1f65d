"""Accuracies as people know them from lm-evaluation-harness."""

from __future__ import annotations

import pytest

from shortstack.artifacts.results import Figure, Result, Results
from shortstack.artifacts.task_table import task_table


def result(model: str, **figures: Figure) -> Result:
    named = {name.replace("__", " "): figure for name, figure in figures.items()}
    data = {"source": "the seven published tasks"}
    return Result(model, "f", "zeroshot", data, {}, named, 2_624_640, 5_250_000, 12.0, 10**9)


BOOLQ, MEAN = Figure(0.60123, 0.01, "accuracy", 9), Figure(0.5, 0.004, "accuracy", 9)


def test_task_metric_value_and_error() -> None:
    lines = Results((result("/a/dense", boolq__acc=BOOLQ, AVE=MEAN),)).to_text().splitlines()
    assert lines == [
        "zeroshot on the seven published tasks",
        "task   metric   value  ±  stderr",
        "-----  ------  ------  -  ------",
        "boolq  acc     0.6012  ±  0.0100",
        "AVE            0.5000  ±  0.0040",
        "higher is better",
        "dense: 2.62M parameters, 5.25 MB; peak memory 1 GB, 12 s",
        "dense: /a/dense",
    ]


def test_models_stand_together_within_eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    one = result("/a/dense", winogrande__acc=BOOLQ, arc_challenge__acc_norm=BOOLQ)
    other = result("/a/pruned", winogrande__acc=MEAN, arc_challenge__acc_norm=Figure(None, None, "accuracy", 0, "none"))
    table = task_table([one, other], "zeroshot")
    assert [cell.strip() for cell in table.head] == ["task", "metric", "model", "value", "±", "stderr"]
    assert [[cell.strip() for cell in row] for row in table.rows] == [
        ["winogrande", "acc", "dense", "0.6012", "±", "0.0100"],
        ["winogrande", "acc", "pruned", "0.5000", "±", "0.0040"],
        ["arc_challenge", "acc_norm", "dense", "0.6012", "±", "0.0100"],
        ["arc_challenge", "acc_norm", "pruned", "-", "", ""],
    ]
    assert max(map(len, Results((one, other)).to_text().splitlines())) <= 80
