"""What a training run left beside its checkpoint: its losses step by step, and figures before and after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shortstack.artifacts.provenance import RETRAINING_FILES
from shortstack.common.formatting import count
from shortstack.common.json_fields import mapping, number
from shortstack.common.json_text import read_json
from shortstack.common.tables import Table
from shortstack.errors import ShortstackError

METRICS, _, MODELS = RETRAINING_FILES
# What losses are measured in: those of tokens, and those of blocks that are trained towards hidden states.
NATS, STATES = "nats per predicted token", "relative squared error of hidden states"


@dataclass(frozen=True)
class TrainingLog:
    """A training run.

    Attributes:
        metrics: a record per line of metrics.jsonl: step, losses, tokens.
        models: "before", "after" and, where it is known, "dense" -> parameters and figures.
    """

    metrics: list[dict[str, Any]]
    models: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def unit(self) -> str:
        """What its losses are measured in."""
        return STATES if any("block" in line for line in self.metrics) else NATS

    def curve(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of a measure, where it was measured."""
        return [(line["step"], line[name]) for line in self.metrics if line.get(name) is not None]


def load_training(folder: Path) -> TrainingLog | None:
    """Read what training left in a folder; None where there is no metrics.jsonl.

    Raises:
        ShortstackError: a file is damaged.
    """
    path = folder / METRICS
    if not path.is_file():
        return None
    try:
        metrics = [_line(read_json(line)) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        path = folder / MODELS
        models = mapping(read_json(path.read_bytes()), "models") if path.is_file() else {}
        for row in models.values():
            int(number(row.get("parameters"), "parameters"))
            for name, value in mapping(row, "figures").items():
                if value is not None:
                    number(value, name)
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ShortstackError(
            f"{path}: not a log of shortstack's training ({error})", hint="train again, or remove the file"
        ) from None
    return TrainingLog(metrics, models)


def before_and_after_table(models: Mapping[str, Mapping[str, Any]]) -> Table:
    """The same figures of a checkpoint before and after training and of the dense model."""
    names = list(dict.fromkeys(name for row in models.values() for name in row["figures"]))
    head = ["", "parameters", *("validation loss" if name == "validation" else name for name in names)]
    rows = [
        [which, count(int(row["parameters"])), *(_shown(row["figures"].get(name)) for name in names)]
        for which, row in models.items()
    ]
    return Table(head, rows)


def _line(record: Any) -> dict[str, Any]:
    found = {"step": number(record.get("step"), "step")}
    for name, value in record.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            found[name] = float(value)
    return found


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
