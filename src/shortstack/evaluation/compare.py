"""Compare results: every figure of every model against one of them, with paired standard errors.

Pairs are windows, rows or prompts that both models were measured on: what makes one hard makes it hard for both, and the
error of their difference is often a tenth of the error of either figure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from shortstack.artifacts.results import Figure, Result, Results, load_results, perplexity
from shortstack.artifacts.units import is_per_token, unit_differences, units_unknown, unlike_notes
from shortstack.baselines.figures import PublishedResult, published_result
from shortstack.common.option_values import Form, Listed
from shortstack.common.options import stage
from shortstack.common.significance import MANY, fisher_p, sign_p, student_p
from shortstack.errors import ShortstackError, UsageError
from shortstack.evaluation.comparison import ComparedFigure, Comparison, Difference
from shortstack.runtime.atomic_output import check_writable_file, write_json

if TYPE_CHECKING:
    ResultsSource = Path | Results
else:
    ResultsSource = Annotated[Path, Form(also="shortstack.artifacts.results:Results")]

_SETTINGS = ("limit", "num_fewshot", "new_tokens", "seed", "dense", "joined_by")  # that make figures comparable
_FEW_ROWS = 1000  # up to which accuracies on other rows have an exact test


@stage
def compare(
    *results: ResultsSource, base: str | None = None, published: Listed | None = None, out: Path | None = None
) -> Comparison:
    """Compare the results of several models, with differences and their paired standard errors.

    Args:
        results: Results files that `shortstack eval` or `shortstack bench` wrote. A file may hold several models.
        base: The model that the others are compared with. By default it is the first one, so give the dense model's
            results first.
        published: Show these published models beside the results, separated by commas, such as
            `st-vicuna-v1.3-5.5b-ppl`.
        out: Write the comparison to this file (JSON).

    Returns:
        The comparison.

    Raises:
        ShortstackError: a file is not a results file, or there is nothing to compare.
    """
    if not results:
        raise UsageError("no results given", hint="shortstack compare results.json [...]")
    if out is not None:
        check_writable_file(Path(out))
    beside = [published_result(name.strip()) for name in published.split(",")] if published else []
    pooled = [result for one in results for result in (one if isinstance(one, Results) else load_results(one)).results]
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
    if len(set(names)) < len(names):  # one path, evaluated before and after it was rewritten
        names = [f"{name} ({fingerprint[:8]})" for name, fingerprint in order]
    figures, notes = [], []
    for (what, sha256), data in _groups(results).items():
        group = []
        for key in order:
            found, left_out = _gathered(results, key, what, sha256)
            group.append(found)
            notes += [f"{what} on {data}: {note}" for note in left_out]
        figures += _compared_group(what, data, group, beside)
        notes += _incomparable(what, data, group)
        if beside and any(result is not None and result.settings.get("limit") for result in group):
            notes.append(f"{what} on {data}: published figures are of all rows")
    if any(figure.what == "ppl" and any(value is not None for value in figure.published) for figure in figures):
        notes.append(
            "published perplexities are per token of the published models' tokenizers, which are not recorded: compare them "
            "only with those of models that have the same tokenizer"
        )
    facts = [models[key] for key in order]
    return Comparison(
        names, [fact.parameters for fact in facts], [fact.nbytes for fact in facts], figures, list(beside), notes
    )


def _groups(results: Sequence[Result]) -> dict[tuple[str, Any], str]:
    """(kind of evaluation, hash of its rows) -> what the first of the results calls these rows."""
    groups: dict[tuple[str, Any], str] = {}
    for result in results:
        if result.figures:
            groups.setdefault((result.what, result.data.get("sha256")), str(result.data.get("source", "")))
    return groups


def _gathered(
    results: Sequence[Result], key: tuple[str, str], what: str, sha256: Any
) -> tuple[Result | None, list[str]]:
    """(all figures of a model on some data as one result, the newest where there are several; lines about the others)."""
    same = [
        result
        for result in results
        if (result.model, result.fingerprint) == key and (result.what, result.data.get("sha256")) == (what, sha256)
    ]
    if not same:
        return None, []
    found, notes = same[-1], []
    for older in reversed(same[:-1]):
        other = _other_settings(found, older)
        if other:
            notes.append(f"an older result of {older.model}, measured with another {', '.join(other)}, is left out")
            continue
        repeated = [name for name, figure in older.figures.items() if found.figures.get(name, figure) != figure]
        if repeated:
            notes.append(f"{older.model} has several results of {', '.join(repeated)}: the last one given is shown")
        found = replace(
            found, figures={**older.figures, **found.figures}, per_item={**older.per_item, **found.per_item}
        )
    return found, notes


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


def _value(result: Result, key: str) -> str:
    value = result.settings.get(key)
    return "none" if value is None else repr(value) if isinstance(value, str) else str(value)


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
            differing = ", ".join(f"{key} ({_value(result, key)}, not {_value(base, key)})" for key in other)
            notes.append(f"{what} on {data}: {result.model} was measured with another {differing} and is not compared")
        elif _dtype_of(base) != _dtype_of(result):
            notes.append(f"{what} on {data}: {base.model} in {_dtype_of(base)}, {result.model} in {_dtype_of(result)}")
    return notes


def _other_windows(what: str, data: str, base: Result, others: Sequence[Result]) -> list[str]:
    """Lines about perplexities that have no counterpart: their windows are of another length, or begin otherwise."""
    return [
        f"{what} on {data}: {', '.join(base.figures)} of {base.model} and {', '.join(other.figures)} of {other.model} are "
        "over windows of different lengths or BOS rules (--bos) and are not compared"
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
    return _unpaired(ours, theirs) if len(pairs) < 2 else _paired(pairs, ours.unit)


def _paired(pairs: Sequence[tuple[float, float]], unit: str) -> Difference | None:
    """Of two figures over the same items; None where an item's value is not finite."""
    differences = [b - a for a, b in pairs]
    mean = math.fsum(differences) / len(pairs)
    if not math.isfinite(mean):
        return None
    stderr = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (len(pairs) - 1) / len(pairs))
    changed = _changed_rows(pairs)
    p = student_p(_in_errors(mean, stderr), len(pairs)) if changed is None else sign_p([(*changed, 1 / len(pairs))])
    if unit == "ppl":  # per item are mean NLLs; exp of their mean difference is the ratio of perplexities
        ratio = perplexity(mean)
        if math.isinf(ratio):
            return Difference(ratio, None, len(pairs))
        return Difference(math.expm1(mean), ratio * stderr, len(pairs), p)
    return Difference(mean, stderr, len(pairs), p)


def _changed_rows(pairs: Sequence[tuple[float, float]]) -> tuple[int, int] | None:
    """(rows that became right, rows that became wrong), of rows that are either; else None."""
    if any(value not in (0, 1) for pair in pairs for value in pair):
        return None
    return sum(b > a for a, b in pairs), sum(b < a for a, b in pairs)


def _in_errors(value: float, stderr: float) -> float:
    """How many standard errors a value is from 0."""
    return value / stderr if stderr else math.inf if value else 0.0


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
    stderr /= len(known)
    pairs = [_pairs(name, base, other) for name in names]
    changed = [_changed_rows(of_task) if len(of_task) > 1 else None for of_task in pairs]
    if all(rows is not None for rows in changed):
        p = sign_p(
            [(*rows, 1 / len(of_task)) for rows, of_task in zip(changed, pairs, strict=True) if rows is not None]
        )
    else:
        fewest = min((len(of_task) for of_task in pairs if of_task), default=MANY)
        p = student_p(_in_errors(plain, stderr), fewest)
    return Difference(plain, stderr, sum(difference.pairs for difference in known), p)


def _unpaired(ours: Figure, theirs: Figure) -> Difference | None:
    """Of two figures without common items; None where both are infinite."""
    assert ours.value is not None
    assert theirs.value is not None
    if ours.unit == "ppl":
        ratio = theirs.value / ours.value
        value, weights = ratio - 1, (ratio / ours.value, ratio / theirs.value)
    else:
        value, weights = theirs.value - ours.value, (1.0, 1.0)
    if math.isnan(value):
        return None
    if ours.stderr is None or theirs.stderr is None or math.isinf(value):
        return Difference(value, None, 0)
    stderr = math.hypot(ours.stderr * weights[0], theirs.stderr * weights[1])
    return Difference(value, stderr, 0, _unpaired_p(ours, theirs, _in_errors(value, stderr)))


def _unpaired_p(ours: Figure, theirs: Figure, errors: float) -> float:
    """Fisher's exact test of accuracies on few rows; else by the errors of both, and the smaller number of items."""
    rows = (ours.n, theirs.n)
    right = tuple(round((figure.value or 0) * figure.n) for figure in (ours, theirs))
    if ours.unit == "accuracy" and 0 < min(rows) <= max(rows) <= _FEW_ROWS and len(right) == 2:
        return fisher_p(right, rows)
    return student_p(errors, min(rows) or MANY)


def check_published(values: Mapping[str, Any]) -> list[str]:
    """Refuse names of published figures that do not exist, before anything runs.

    Raises:
        ShortstackError: there is no such figure.
    """
    for name in (values.get("published") or "").split(","):
        if name:
            published_result(name.strip())
    return []
