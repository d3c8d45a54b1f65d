"""Compare results: every figure of every model against one of them, with paired standard errors.

Pairs are windows, rows or prompts that both models were measured on: what makes one hard makes it hard for both, and the
error of their difference is often a tenth of the error of either figure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shortstack.artifacts.results import Figure, Result, load_results, perplexity, shown_figure
from shortstack.artifacts.units import is_per_token, unit_differences, units_unknown, unlike_notes
from shortstack.baselines.figures import PublishedResult, published_result
from shortstack.common.formatting import count, size, table
from shortstack.errors import ShortstackError, UsageError
from shortstack.runtime.atomic_output import check_writable_file, write_json

_NOISE = 1.96  # standard errors: 95 of 100 differences of nothing are smaller
_SAME = "≈"
_SETTINGS = ("limit", "num_fewshot", "new_tokens", "seed", "dense", "joined_by")  # that make figures comparable


@dataclass(frozen=True)
class Difference:
    """One figure of one model against the base's.

    Attributes:
        value: for perplexities the ratio minus 1, else the plain difference.
        stderr: of it; None where nothing is known of it.
        pairs: items that both were measured on; 0 where the errors are those of two separate figures.
    """

    value: float
    stderr: float | None
    pairs: int

    @property
    def is_noise(self) -> bool | None:
        """Whether it is within 1.96 standard errors of nothing; None where that is not known."""
        return None if self.stderr is None else abs(self.value) <= _NOISE * self.stderr

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return {"value": self.value, "stderr": self.stderr, "pairs": self.pairs, "within_noise": self.is_noise}


@dataclass(frozen=True)
class ComparedFigure:
    """One figure of all models.

    Attributes:
        what, data, name: which figure, on what.
        figures: a figure per model; None where there is none.
        differences: against the base; None for the base itself and where there is nothing to compare.
        published: a value per published model.
    """

    what: str
    data: str
    name: str
    figures: list[Figure | None]
    differences: list[Difference | None]
    published: list[float | None] = field(default_factory=list)


@dataclass(frozen=True)
class Comparison:
    """Models side by side.

    Attributes:
        models: the base first.
        parameters, nbytes: of each.
        figures: in the order of the results.
        published: names of published models that stand beside them.
    """

    models: list[str]
    parameters: list[int]
    nbytes: list[int]
    figures: list[ComparedFigure]
    published: list[PublishedResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "schema": 1,
            "what": "compare",
            "models": self.models,
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "published": [published.name for published in self.published],
            "figures": [
                {
                    "what": one.what,
                    "data": one.data,
                    "name": one.name,
                    "figures": [None if figure is None else figure.to_json() for figure in one.figures],
                    "differences": [None if found is None else found.to_json() for found in one.differences],
                    "published": one.published,
                }
                for one in self.figures
            ],
            "notes": self.notes,
        }

    def to_text(self) -> str:
        """A table per kind of evaluation and text."""
        parts = [
            self._table(
                "", [self._sizes("parameters", self.parameters, count), self._sizes("bytes", self.nbytes, size)]
            )
        ]
        for what, data in dict.fromkeys((one.what, one.data) for one in self.figures):
            rows = [self._row(one) for one in self.figures if (one.what, one.data) == (what, data)]
            parts.append(self._table(f"{what} on {data}", rows))
        lines = [
            f"differences are against {self.models[0]}, with paired standard errors; of perplexities they are ratios; "
            f"{_SAME} within noise ({_NOISE} standard errors)"
        ]
        if self.published:
            lines.append(f"published: {self.published[0].note}")
        return "\n\n".join([*parts, "\n".join([*lines, *self.notes])])

    def _table(self, title: str, rows: Sequence[list[str]]) -> str:
        heads = ["", self.models[0]]
        for model in self.models[1:]:
            heads += [model, "difference"]
        heads += [f"published {published.name}" for published in self.published]
        if self.published and not any(
            any(row[-len(self.published) :]) for row in rows
        ):  # nothing of this was published
            heads, rows = heads[: -len(self.published)], [row[: -len(self.published)] for row in rows]
        return "\n".join([*([title] if title else []), table(heads, rows)])

    def _sizes(self, name: str, values: Sequence[int], show: Any) -> list[str]:
        cells = [show(values[0])]
        for value in values[1:]:
            cells += [show(value), f"{value / values[0] - 1:+.1%}"]
        published = [show(one.parameters) if name == "parameters" else "" for one in self.published]
        return [name, *cells, *published]

    def _row(self, one: ComparedFigure) -> list[str]:
        cells = [shown_figure(one.figures[0])]
        for figure, difference in zip(one.figures[1:], one.differences[1:], strict=True):
            unit = figure.unit if figure is not None else ""
            cells += [shown_figure(figure), _shown(difference, unit)]
        unit = next((figure.unit for figure in one.figures if figure is not None), "")
        published = ["" if value is None else shown_figure(Figure(value, None, unit, 0)) for value in one.published]
        return [one.name, *cells, *published]


def compare(
    *results: Path, base: str | None = None, published: str | None = None, out: Path | None = None
) -> Comparison:
    """Set the results of several models side by side, with differences and their paired standard errors.

    Args:
        results: files that `shortstack eval ... --out` wrote; one may hold several models.
        base: the model that the others are compared with; by default the first one (give the dense model's results first).
        published: published models to put beside them, separated by commas, such as `st-vicuna-v1.3-5.5b-ppl`.
        out: write the comparison here (JSON).

    Returns:
        The comparison.

    Raises:
        ShortstackError: a file is no results file, or there is nothing to compare.
    """
    if not results:
        raise UsageError("no results given", hint="shortstack compare results.json [...]")
    if out is not None:
        check_writable_file(Path(out))
    beside = [published_result(name.strip()) for name in published.split(",")] if published else []
    pooled = [result for file in results for result in load_results(Path(file)).results]
    found = compared(pooled, base, beside)
    if out is not None:
        write_json(Path(out), found.to_json())
    return found


def compared(results: Sequence[Result], base: str | None, beside: Sequence[PublishedResult]) -> Comparison:
    """The comparison of results in memory.

    Raises:
        ShortstackError: one model alone and nothing published beside it, or the base is not among them.
    """
    models: dict[tuple[str, str], Result] = {}
    for result in results:
        models.setdefault((result.model, result.fingerprint), result)
    order = list(models)
    if base is not None:
        chosen = [key for key in order if key[0].rstrip("/") == base.rstrip("/")]
        if not chosen:
            raise UsageError(f"--base {base}: not among the models ({', '.join(dict.fromkeys(k[0] for k in order))})")
        order = [chosen[0], *(key for key in order if key != chosen[0])]
    if len(order) < 2 and not beside:
        raise ShortstackError(
            f"these are results of one model ({order[0][0]}): nothing to compare",
            hint="give results of several models, or --published NAME",
        )
    names = [key[0] for key in order]
    if len(set(names)) < len(names):  # one path, evaluated before and after it was written anew
        names = [f"{name} ({fingerprint[:8]})" for name, fingerprint in order]
    figures, notes = [], []
    for what, data, sha256 in dict.fromkeys(
        (r.what, _data_name(r), r.data.get("sha256")) for r in results if r.figures
    ):
        group = [_last(results, key, what, sha256) for key in order]
        figures += _compared_group(what, data, group, beside)
        notes += _incomparable(what, data, group)
        if beside and any(result is not None and result.settings.get("limit") for result in group):
            notes.append(f"{what} on {data}: published figures are of all rows")
    if any(figure.what == "ppl" and any(value is not None for value in figure.published) for figure in figures):
        notes.append(
            "published perplexities are per token of the published models' own tokenizers, which are not recorded: they "
            "compare with those of models that have the same one"
        )
    facts = [models[key] for key in order]
    return Comparison(
        names, [fact.parameters for fact in facts], [fact.nbytes for fact in facts], figures, list(beside), notes
    )


def _data_name(result: Result) -> str:
    return str(result.data.get("source", ""))


def _last(results: Sequence[Result], key: tuple[str, str], what: str, sha256: Any) -> Result | None:
    """The newest result of a model on some data."""
    found = None
    for result in results:
        if (result.model, result.fingerprint) == key and (result.what, result.data.get("sha256")) == (what, sha256):
            found = result
    return found


def _compared_group(
    what: str, data: str, group: Sequence[Result | None], beside: Sequence[PublishedResult]
) -> list[ComparedFigure]:
    names = list(dict.fromkeys(name for result in group if result is not None for name in result.figures))
    base = group[0]
    found = []
    for name in names:
        figures = [None if result is None else result.figures.get(name) for result in group]
        differences: list[Difference | None] = [None]
        for result in group[1:]:
            comparable = base is not None and result is not None and _comparable(base, result, name)
            differences.append(_difference(name, base, result) if comparable else None)  # type: ignore[arg-type]
        published = [one.figures.get((what, data if what == "ppl" else "", name)) for one in beside]
        found.append(ComparedFigure(what, data, name, figures, differences, published))
    return found


def _comparable(base: Result, other: Result, name: str) -> bool:
    if _other_settings(base, other):
        return False
    return not (is_per_token(base, name) and unit_differences(base, other))


def _other_settings(one: Result, other: Result) -> list[str]:
    return [key for key in _SETTINGS if one.settings.get(key) != other.settings.get(key)]


def _incomparable(what: str, data: str, group: Sequence[Result | None]) -> list[str]:
    base = group[0]
    if base is None:
        return []
    others = [result for result in group[1:] if result is not None]
    notes = [*unlike_notes(base, others), *_other_windows(what, data, base, others)]
    if others and (unknown := units_unknown([base, *others])):
        notes.append(
            f"{what} on {data}: results of an earlier version do not record the tokenizer ({', '.join(unknown)}): whether "
            "figures per token have one unit is not known; evaluate again to be sure"
        )
    for result in others:
        other = _other_settings(base, result)
        if other:
            notes.append(f"{what} on {data}: {result.model} was measured with another {', '.join(other)}: not compared")
        elif _dtype_of(base) != _dtype_of(result):
            notes.append(f"{what} on {data}: {base.model} in {_dtype_of(base)}, {result.model} in {_dtype_of(result)}")
    return notes


def _other_windows(what: str, data: str, base: Result, others: Sequence[Result]) -> list[str]:
    """Lines about perplexities that have no counterpart, because their windows are of another length."""
    return [
        f"{what} on {data}: {', '.join(base.figures)} of {base.model} and {', '.join(other.figures)} of {other.model} are "
        "over windows of other lengths: not compared"
        for other in others
        if what == "ppl" and base.figures and other.figures and not set(base.figures) & set(other.figures)
    ]


def _dtype_of(result: Result) -> str:
    return str(result.settings.get("dtype", "unknown"))


def _difference(name: str, base: Result, other: Result) -> Difference | None:
    ours, theirs = base.figures.get(name), other.figures.get(name)
    if ours is None or theirs is None or ours.value is None or theirs.value is None:
        return None
    if name == "AVE":
        return _mean_difference(base, other)
    pairs = _pairs(name, base, other)
    is_ppl = ours.unit == "ppl"
    if len(pairs) < 2:
        return _unpaired(ours, theirs, is_ppl=is_ppl)
    differences = [b - a for a, b in pairs]
    mean = math.fsum(differences) / len(pairs)
    stderr = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (len(pairs) - 1) / len(pairs))
    if not math.isfinite(mean):
        return None
    if is_ppl:  # per item are mean NLLs; exp of their mean difference is the ratio of perplexities
        ratio = perplexity(mean)
        if math.isinf(ratio):
            return Difference(ratio, None, len(pairs))
        return Difference(math.expm1(mean), ratio * stderr, len(pairs))
    return Difference(mean, stderr, len(pairs))


def _pairs(name: str, base: Result, other: Result) -> list[tuple[float, float]]:
    """Values of the same items; prompts are matched by their numbers."""
    ours, theirs = base.per_item.get(name, []), other.per_item.get(name, [])
    matched: list[tuple[Any, Any]] = []
    if "prompts" in base.per_item and name.partition(" ")[0] in ("greedy", "drawn"):
        asked, asked_too = base.per_item["prompts"], other.per_item.get("prompts", [])
        if len(asked) == len(ours) and len(asked_too) == len(theirs):
            known = dict(zip(asked, ours, strict=True))
            matched = [(known.get(number), value) for number, value in zip(asked_too, theirs, strict=True)]
    elif len(ours) == len(theirs):
        matched = list(zip(ours, theirs, strict=True))
    return [(float(a), float(b)) for a, b in matched if a is not None and b is not None]


def _mean_difference(base: Result, other: Result) -> Difference:
    """Of the mean over tasks: the tasks' rows are independent, so the squares of their errors add up."""
    from shortstack.evaluation.task_files import TASKS

    names = [f"{task} {TASKS[task].metric}" for task in base.data.get("tasks", {}) if task in TASKS]
    found = [_difference(name, base, other) for name in names]
    known = [difference for difference in found if difference is not None]
    plain = other.figures["AVE"].value - base.figures["AVE"].value  # type: ignore[operator]
    if not known or len(known) < len(names) or any(difference.stderr is None for difference in known):
        return Difference(plain, None, 0)
    stderr = math.sqrt(math.fsum(difference.stderr**2 for difference in known if difference.stderr is not None))
    return Difference(plain, stderr / len(known), sum(difference.pairs for difference in known))


def _unpaired(ours: Figure, theirs: Figure, *, is_ppl: bool) -> Difference | None:
    """Of two figures without common items; None where both are infinite."""
    assert ours.value is not None
    assert theirs.value is not None
    if is_ppl:
        ratio = theirs.value / ours.value
        value, weights = ratio - 1, (ratio / ours.value, ratio / theirs.value)
    else:
        value, weights = theirs.value - ours.value, (1.0, 1.0)
    if math.isnan(value):
        return None
    if ours.stderr is None or theirs.stderr is None or math.isinf(value):
        return Difference(value, None, 0)
    return Difference(value, math.hypot(ours.stderr * weights[0], theirs.stderr * weights[1]), 0)


def _shown(difference: Difference | None, unit: str) -> str:
    if difference is None:
        return "-"
    mark = f"{_SAME} " if difference.is_noise else ""
    if unit in ("ppl", "accuracy", "share"):
        error = "" if difference.stderr is None else f" ±{100 * difference.stderr:.2g}"
        sign = "%" if unit == "ppl" else " points"
        return f"{mark}{100 * difference.value:+.1f}{sign}{error}"
    error = "" if difference.stderr is None else f" ±{difference.stderr:.2g}"
    return f"{mark}{difference.value:+.3g}{error}"


def check_published(values: Mapping[str, Any]) -> list[str]:
    """Refuse names of published figures that do not exist, before anything runs.

    Raises:
        ShortstackError: there is no such figure.
    """
    for name in (values.get("published") or "").split(","):
        if name:
            published_result(name.strip())
    return []
