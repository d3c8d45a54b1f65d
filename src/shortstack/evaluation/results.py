"""The record of an evaluation: figures with their errors, and per-item values so that comparisons can be paired."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shortstack.checkpoint.provenance import versions
from shortstack.checkpoint.writer import write_file
from shortstack.tables import count, seconds, size, table

SCHEMA = 1


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Attributes:
        value: None where it cannot be measured on this model; `note` says why.
        stderr: standard error, in the unit of the value, or None.
        unit: such as "ppl" or "nats/token".
        n: how many items (predicted tokens, rows) it is a mean over.
    """

    value: float | None
    stderr: float | None
    unit: str
    n: int
    note: str = ""


@dataclass(frozen=True)
class Result:
    """What one evaluation found on one checkpoint; `to_json` is an entry of results.json, schema 1."""

    model: str
    fingerprint: str
    what: str
    data: dict[str, Any]
    settings: dict[str, Any]
    figures: dict[str, Figure]
    parameters: int
    nbytes: int
    seconds: float
    peak_rss_bytes: int
    per_item: dict[str, list[Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        figures = {
            name: {"value": f.value, "stderr": f.stderr, "unit": f.unit, "n": f.n}
            | ({"note": f.note} if f.note else {})
            for name, f in self.figures.items()
        }
        return {
            "schema": SCHEMA,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "what": self.what,
            "data": self.data,
            "settings": self.settings,
            "figures": figures,
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "seconds": self.seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
            "per_item": self.per_item,
            "notes": self.notes,
            "versions": versions(),
        }


@dataclass(frozen=True)
class Results:
    """Results of one or more checkpoints, evaluated in the same way."""

    results: tuple[Result, ...]

    def to_json(self) -> Any:
        """One record as an object, several as a list."""
        records = [result.to_json() for result in self.results]
        return records[0] if len(records) == 1 else records

    def save(self, path: str | Path) -> None:
        """Write results.json."""
        write_file(Path(path), (json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n").encode())

    def to_text(self) -> str:
        """Models side by side, a row per checkpoint, a column per figure."""
        names = list(dict.fromkeys(name for result in self.results for name in result.figures))
        parts = []
        for data in dict.fromkeys(result.data.get("source", "") for result in self.results):
            chosen = [result for result in self.results if result.data.get("source", "") == data]
            rows = [
                [
                    r.model,
                    count(r.parameters),
                    size(r.nbytes),
                    *(_shown(r.figures.get(n)) for n in names),
                    seconds(r.seconds),
                ]
                for r in chosen
            ]
            header = ["model", "parameters", "bytes", *names, "time"]
            lines = [f"{chosen[0].what} on {data}" if data else chosen[0].what]
            if names:
                first = chosen[0].figures[names[0]]
                lines[0] += f" ({names[0]} over {first.n} predicted tokens; lower is better)"
            lines.append(table(header, rows))
            lines += _texts(chosen)
            lines += dict.fromkeys(note for result in chosen for note in result.notes)
            parts.append("\n".join(lines))
        return "\n\n".join(parts)


def _shown(figure: Figure | None) -> str:
    if figure is None or figure.value is None:
        return "-"
    return f"{figure.value:.4g}" + (f" ±{figure.stderr:.2g}" if figure.stderr is not None else "")


def _texts(results: Sequence[Result]) -> list[str]:
    lines = []
    for result in results:
        for number, text in enumerate(result.per_item.get("texts", []), start=1):
            lines += ["", f"[{result.model}, sample {number}]", text]
    return lines
