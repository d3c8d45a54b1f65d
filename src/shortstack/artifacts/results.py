"""The record of an evaluation: figures with their errors, and per-item values so that comparisons can be paired."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from shortstack.artifacts.provenance import versions
from shortstack.artifacts.task_table import task_table
from shortstack.artifacts.units import unlike_notes
from shortstack.common.formatting import count, legend, seconds, short_names, size
from shortstack.common.json_fields import amount, mapping, number, text
from shortstack.common.json_text import read_json
from shortstack.common.keywords import said_in_python
from shortstack.common.shown import Shown
from shortstack.common.tables import Table
from shortstack.errors import ShortstackError, system_reason
from shortstack.runtime.atomic_output import write_json

SCHEMA = 1
_WIDE = 6  # figures; with more than these a row per figure is easier to read than a column


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Attributes:
        value: The number; None if it cannot be measured on this model (`note` has the reason), infinite if it is too
            large for a float.
        stderr: The standard error in the unit of the value; None if it is unknown.
        unit: The unit, such as "ppl", "accuracy" or "share".
        n: The number of items (predicted tokens, rows) that the value is a mean over.
        note: Why there is no value, or what a reader should know about it.
    """

    value: float | None
    stderr: float | None
    unit: str
    n: int
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        record: dict[str, Any] = {"value": self.value, "stderr": self.stderr, "unit": self.unit, "n": self.n}
        return record | ({"note": self.note} if self.note else {})

    @classmethod
    def from_json(cls, record: Any) -> Figure:
        """Read the JSON form.

        Raises:
            TypeError: it is not the JSON form of a figure.
        """
        found = {key: record.get(key) for key in ("value", "stderr")} if isinstance(record, dict) else {}
        checked = {key: None if value is None else number(value, key) for key, value in found.items()}
        return cls(
            **checked,
            unit=text(record, "unit"),
            n=int(amount(record.get("n"), "n")),
            note=text({"note": "", **record}, "note"),
        )


def mean_figure(values: Sequence[float], unit: str) -> Figure:
    """The mean of per-item values with its standard error; without items, or with one, what cannot be computed is None."""
    count_of = len(values)
    if not count_of:
        return Figure(None, None, unit, 0, "nothing to measure it on")
    mean = math.fsum(values) / count_of
    if count_of == 1:
        return Figure(mean, None, unit, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count_of - 1)
    return Figure(mean, math.sqrt(variance / count_of), unit, count_of)


def mean_of(figures: Mapping[str, Figure]) -> Figure:
    """The plain mean of figures of different rows, by name, with its standard error; None where one of them has no value."""
    values = [figure.value for figure in figures.values()]
    missing = [name for name, value in zip(figures, values, strict=True) if value is None]
    unit = next((figure.unit for figure in figures.values()), "")
    if missing or not figures:
        return Figure(
            None, None, unit, 0, f"no figure of {', '.join(missing)}" if missing else "nothing to measure it on"
        )
    errors = [figure.stderr for figure in figures.values() if figure.stderr is not None]
    stderr = math.sqrt(math.fsum(error**2 for error in errors)) / len(figures) if len(errors) == len(figures) else None
    mean = math.fsum(value for value in values if value is not None) / len(figures)
    return Figure(mean, stderr, unit, sum(figure.n for figure in figures.values()))


def perplexity(nll: float) -> float:
    """exp of a mean negative log-likelihood in nats; infinite beyond what a number can hold, NaN for NaN."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


def perplexity_figure(nll_W: Sequence[float], predicted: int) -> Figure:
    """The perplexity of windows, from the mean NLL of each, with its standard error; `predicted` tokens in each."""
    windows = len(nll_W)
    mean = math.fsum(nll_W) / windows
    value = perplexity(mean)
    if not math.isfinite(value):
        return Figure(value, None, "ppl", windows * predicted, f"not finite: the mean NLL is {mean:.4g} nats a token")
    stderr = None
    if windows > 1:
        variance = math.fsum((nll - mean) ** 2 for nll in nll_W) / (windows - 1)
        stderr = value * math.sqrt(variance / windows)  # of exp(mean), to first order
    return Figure(value, stderr, "ppl", windows * predicted)


@dataclass(frozen=True)
class Result:
    """One evaluation of one checkpoint; `to_json` is an entry of results.json, schema 1.

    Attributes:
        model: The checkpoint, as it was named in the call.
        fingerprint: The fingerprint of the checkpoint.
        what: The kind of evaluation: ppl, zeroshot, generation, samples or bench.
        data: The source, sha256 and number of rows of the data.
        settings: The options that the figures depend on.
        figures: The figures by name.
        parameters: The number of parameters of the checkpoint.
        nbytes: The size of its weights in bytes.
        seconds: The wall-clock time of this evaluation in seconds.
        peak_rss_bytes: The peak memory of the process in bytes.
        peak_device_bytes: The peak memory of the GPU in bytes; None without a GPU.
        per_item: The value of each window, row or prompt by the name of the figure, and generated texts.
        command_seconds: The wall-clock time of the whole command in seconds; None in files of earlier versions.
        notes: What a reader of the figures should know.
    """

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
    peak_device_bytes: int | None = None
    per_item: dict[str, list[Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    command_seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        on_device = {} if self.peak_device_bytes is None else {"peak_device_bytes": self.peak_device_bytes}
        return {
            "schema": SCHEMA,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "what": self.what,
            "data": self.data,
            "settings": self.settings,
            "figures": {name: figure.to_json() for name, figure in self.figures.items()},
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "seconds": self.seconds,
            "command_seconds": self.command_seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
            **on_device,
            "per_item": self.per_item,
            "notes": self.notes,
            "versions": versions("lm_eval"),
        }

    @classmethod
    def from_json(cls, record: Any) -> Result:
        """Read the JSON form.

        Raises:
            TypeError: it is not the JSON form of a result.
        """
        if not isinstance(record, dict) or record.get("schema") != SCHEMA:
            raise TypeError(f"expected an object with schema {SCHEMA}")
        figures = {name: Figure.from_json(figure) for name, figure in mapping(record, "figures").items()}
        per_item = mapping(record, "per_item") if "per_item" in record else {}
        if not all(isinstance(values, list) for values in per_item.values()):
            raise TypeError("per_item holds something other than lists")
        for name in figures.keys() & per_item.keys():
            if not all(value is None or _is_measure(value) for value in per_item[name]):
                raise TypeError(f"per_item of {name} holds something other than measures")
        data = mapping(record, "data")
        if not isinstance(data.get("sha256"), str | None):
            raise TypeError("sha256 of data is no text")
        for name in ("parameters", "bytes"):
            if not 1 <= number(record.get(name), name) < 1e18:
                raise TypeError(f"{name} is {record[name]}, expected a size")
        on_device, taken = record.get("peak_device_bytes"), record.get("command_seconds")
        return cls(
            model=text(record, "model"),
            fingerprint=text(record, "fingerprint"),
            what=text(record, "what"),
            data=data,
            settings=mapping(record, "settings"),
            figures=figures,
            parameters=int(number(record.get("parameters"), "parameters")),
            nbytes=int(number(record.get("bytes"), "bytes")),
            seconds=amount(record.get("seconds"), "seconds"),
            peak_rss_bytes=int(amount(record.get("peak_rss_bytes"), "peak_rss_bytes")),
            peak_device_bytes=None if on_device is None else int(amount(on_device, "peak_device_bytes")),
            per_item=per_item,
            notes=[str(note) for note in record.get("notes", [])],
            command_seconds=None if taken is None else amount(taken, "command_seconds"),
        )


def _is_measure(value: Any) -> bool:
    """Whether it is a number whose square is one, too; infinity and NaN are kept as they were measured."""
    return isinstance(value, (int, float)) and (not math.isfinite(value) or abs(value) < 1e150)


@dataclass(frozen=True, repr=False)
class Results(Shown):
    """The results of one or more checkpoints, evaluated in the same way.

    Attributes:
        results: One entry for each checkpoint and evaluation.
    """

    results: tuple[Result, ...]

    def to_json(self) -> Any:
        """One result as an object, several as a list."""
        records = [result.to_json() for result in self.results]
        return records[0] if len(records) == 1 else records

    def save(self, path: str | Path) -> None:
        """Write results.json."""
        write_json(Path(path), self.to_json())

    def table_rows(self) -> list[dict[str, Any]]:
        """One row for each model and figure."""
        return [
            {"model": one.model, "what": one.what, "data": one.data.get("source"), "figure": name}
            | {"value": figure.value, "stderr": figure.stderr, "unit": figure.unit, "n": figure.n}
            for one in self.results
            for name, figure in one.figures.items()
        ]

    def to_text(self) -> str:
        """One table for each kind of evaluation and text, with the models side by side."""
        groups = [_group_text(what, data, found) for (what, data), found in self._groups().items()]
        return "\n\n".join([*groups, *self.time_line()])

    def time_line(self) -> list[str]:
        """The time that the command took, as a line; empty for results of several commands."""
        times = {result.command_seconds for result in self.results}
        known = [time for time in times if time is not None]
        return (
            [f"the whole command took {seconds(known[0])}, loading included"] if len(times) == len(known) == 1 else []
        )

    def in_time(self, taken: float) -> Self:
        """The same results with the time that the command took."""
        return replace(self, results=tuple(replace(result, command_seconds=taken) for result in self.results))

    def tables(self) -> list[Table]:
        """One table for each kind of evaluation and text, without sample texts and notes."""
        return [_group_table(what, data, found) for (what, data), found in self._groups().items()]

    def _groups(self) -> dict[tuple[str, str], list[Result]]:
        groups: dict[tuple[str, str], list[Result]] = {}
        for result in self.results:
            groups.setdefault((result.what, str(result.data.get("source", ""))), []).append(result)
        return groups


@said_in_python
def load_results(path: str | Path) -> Results:
    """Read a results.json with one result or several.

    Args:
        path: The results.json.

    Returns:
        The results.

    Raises:
        ShortstackError: there is no such file, or it is not a results file.
    """
    path = Path(path)
    try:
        record = read_json(path.read_bytes())
        results = [Result.from_json(entry) for entry in (record if isinstance(record, list) else [record])]
    except OSError as error:
        raise ShortstackError(
            f"{path}: cannot be read ({system_reason(error)})", hint="give a file that `shortstack eval --out` wrote"
        ) from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ShortstackError(
            f"{path}: not a results file ({error})", hint="give a file that `shortstack eval --out` wrote"
        ) from None
    if not results:
        raise ShortstackError(f"{path}: holds no results", hint="give a file that `shortstack eval --out` wrote")
    return Results(tuple(results))


def _group_text(what: str, data: str, results: Sequence[Result]) -> str:
    is_of_tasks = what == "zeroshot"
    table = task_table(results, f"{what} on {data}") if is_of_tasks else _group_table(what, data, results)
    lines = [table.to_text()]
    lines += legend(list(dict.fromkeys(result.model for result in results)))
    lines += _sample_texts(results)
    lines += unlike_notes(results[0], results[1:])
    lines += dict.fromkeys(note for result in results for note in result.notes)
    return "\n".join(lines)


def _group_table(what: str, data: str, results: Sequence[Result]) -> Table:
    names = list(dict.fromkeys(name for result in results for name in result.figures))
    title = f"{what} on {data}" if data else what
    if what == "ppl" and names:
        first = next(
            (name for name in names if any(name in r.figures and r.figures[name].n for r in results)), names[0]
        )
        measured = dict.fromkeys(str(r.figures[first].n) for r in results if first in r.figures)
        title += f" ({first} over {' and '.join(measured)} predicted tokens; lower is better)"
    facts = [("parameters", [count(r.parameters) for r in results]), ("bytes", [size(r.nbytes) for r in results])]
    shown = [(name, [shown_figure(r.figures.get(name)) for r in results]) for name in names]
    cost = [("peak memory", [size(_peak(r)) for r in results]), ("measured in", [seconds(r.seconds) for r in results])]
    columns = [*facts, *shown, *cost]
    models = short_names([result.model for result in results])
    if len(names) > _WIDE:
        return Table(["", *models], [[name, *cells] for name, cells in columns], title)
    rows = [[model, *(cells[at] for _, cells in columns)] for at, model in enumerate(models)]
    return Table(["model", *(name for name, _ in columns)], rows, title)


def _peak(result: Result) -> int:
    return result.peak_rss_bytes if result.peak_device_bytes is None else result.peak_device_bytes


def shown_figure(figure: Figure | None) -> str:
    """A figure with its error, in the digits that mean something; shares and accuracies in percent."""
    if figure is None or figure.value is None:
        return "-"
    if figure.unit in ("accuracy", "share"):
        return f"{figure.value:.1%}" + (f" ±{100 * figure.stderr:.1f}" if figure.stderr is not None else "")
    if figure.unit == "bytes":
        return size(round(figure.value))
    return f"{figure.value:.4g}" + (f" ±{figure.stderr:.2g}" if figure.stderr is not None else "")


def _sample_texts(results: Sequence[Result]) -> list[str]:
    lines = []
    for result in results:
        if result.what != "samples":
            continue
        for at, sample in enumerate(result.per_item.get("texts", []), start=1):
            lines += ["", f"[{result.model}, sample {at}]", sample]
    return lines
