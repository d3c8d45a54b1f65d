"""The verdict of a report: one paragraph that is made from the figures and from nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from shortstack.artifacts.plan import PrunePlan
from shortstack.artifacts.results import Figure, Result, shown_figure
from shortstack.benchmark.timing import paired_ratio
from shortstack.common.formatting import count, ranges, size
from shortstack.common.significance import student_errors
from shortstack.evaluation.comparison import ComparedFigure, Comparison, Difference
from shortstack.publishing.report.material import Material
from shortstack.publishing.report.names import NamedModel, figure_name, shown

_LISTED = 6


@dataclass(frozen=True)
class Tile:
    """One figure that stands out: what it is, and in small what it is of."""

    value: str
    name: str
    detail: str


@dataclass(frozen=True)
class Verdict:
    """The paragraph, sentence by sentence, and the figures that stand out."""

    sentences: list[str]
    tiles: list[Tile]

    @property
    def text(self) -> str:
        """The paragraph."""
        return " ".join(self.sentences)


def verdict(
    material: Material, models: Sequence[NamedModel], comparison: Comparison | None, bench: Sequence[Result]
) -> Verdict:
    """How much smaller, how much faster, what it cost, and what is within noise."""
    sentences: list[str] = []
    tiles: list[Tile] = []
    noise: list[str] = []
    if material.plan is not None:
        _smaller(material.plan, sentences, tiles)
    sentences += _others(material, models)
    missing = [*_faster(bench, sentences, tiles, noise), *_costs(comparison, sentences, tiles, noise)]
    sentences += _noise(comparison, noise)
    return Verdict([*sentences, *missing], tiles)


def _smaller(plan: PrunePlan, sentences: list[str], tiles: list[Tile]) -> None:
    removed, blocks = len(plan.removed), len(plan.blocks)
    if not removed:
        sentences.append(f"No block of {shown(plan.source)} is removed.")
        return
    chosen = "" if plan.criterion == "given" else f", chosen by {plan.criterion}"
    first = f"{removed} of the {blocks} blocks of {shown(plan.source)} are removed ({ranges(plan.removed)}{chosen})"
    changes = []
    for key, name, show in (
        ("parameters", "parameters", count), ("bytes", "size", size), ("kv_bytes_per_token", "KV cache per token", size),
    ):  # fmt: skip
        before, after = plan.before.get(key), plan.after.get(key)
        if before and after is not None:
            change = _percent(after / before - 1)
            changes.append(f"{name} from {show(before)} to {show(after)} ({change})")
            if key != "kv_bytes_per_token":
                tiles.append(Tile(change, name, f"{show(before)} → {show(after)}"))
    sentences.append(f"{first}: {', '.join(changes)}." if changes else f"{first}.")


def _others(material: Material, models: Sequence[NamedModel]) -> list[str]:
    """What was done after pruning."""
    sentences = []
    for history in material.histories:
        steps = history.record["steps"]
        last = steps[-1] if steps else {}
        tokens = last.get("tokens")
        if last.get("stage") == "retrain" and isinstance(tokens, int):
            sentences.append(
                f"The retraining ({last.get('method')}) took {last.get('steps')} steps with {count(tokens)} tokens."
            )
    dense = next((one for one in models if one.role == "dense"), None)
    for model in models:
        if model.role == "quantized" and dense is not None:
            change = _percent(model.nbytes / dense.nbytes - 1)
            sentences.append(
                f"The quantized checkpoint takes {size(model.nbytes)} ({change} compared with the dense model)."
            )
    return sentences


def _faster(bench: Sequence[Result], sentences: list[str], tiles: list[Tile], noise: list[str]) -> list[str]:
    """The speed-up; returns sentences about what is unknown."""
    timed = [one for one in bench if one.figures["latency"].value is not None]
    if not timed:
        return ["Speed and memory were not measured."]
    first = timed[0]
    # One configuration speaks for all: the smallest batch with the longest texts, as one user meets it.
    at = min(timed, key=lambda one: (one.settings["engine"] != first.settings["engine"], *_heaviness(one)))
    same = [one for one in timed if one.data.get("source") == at.data.get("source")]
    base = next((one for one in same if one.model == first.model), None)
    others = [one for one in same if base is not None and one.model != base.model]
    if base is None or not others:
        return ["Speed was measured on one model only, so the speed-up is unknown."]
    found = []
    for other in others:
        speedup = other.figures.get("latency_speedup")
        speedup = speedup or paired_ratio(base.per_item.get("latency", []), other.per_item.get("latency", []))
        if speedup.value is None:
            continue
        error = f" ±{speedup.stderr:.2g}" if speedup.stderr is not None else ""
        ideal = other.figures.get("latency_ideal")
        best = f" (ideal: {ideal.value:.2f})" if ideal is not None and ideal.value is not None else ""
        found.append(
            f"{other.model} is {speedup.value:.2f}{error} times as fast as {base.model}{best}{_memory(base, other)}"
        )
        if len(found) == 1:
            tiles.append(Tile(f"{speedup.value:.2f}x", "speed", f"{other.model}, batch {at.settings['batch']}"))
        if speedup.stderr is not None and abs(speedup.value - 1) <= student_errors(speedup.n) * speedup.stderr:
            noise.append(f"speed of {other.model}")
    where = f"{at.settings['engine']}, {at.settings['dtype']} on {at.settings['device']}, batch {at.settings['batch']}"
    if found:
        sentences.append(f"Generation of {at.settings['new_tokens']} tokens ({where}): {'; '.join(found)}.")
    return []


def _heaviness(result: Result) -> tuple[int, int]:
    return result.settings["batch"], -result.settings["new_tokens"]


def _memory(base: Result, other: Result) -> str:
    ours, theirs = (one.peak_device_bytes or one.peak_rss_bytes for one in (base, other))
    if not ours or not theirs:
        return ""
    return f", with a peak memory of {size(theirs)} instead of {size(ours)} ({_percent(theirs / ours - 1)})"


def _costs(comparison: Comparison | None, sentences: list[str], tiles: list[Tile], noise: list[str]) -> list[str]:
    """The cost in quality; returns sentences about what is unknown."""
    if comparison is None or not comparison.figures:
        return ["Quality was not measured."]
    told: set[tuple[str, str]] = set()
    for one in comparison.figures:
        speaks = one.name == "AVE" if one.what == "zeroshot" else one.what == "ppl"
        for model, change in zip(comparison.models, one.differences, strict=True):
            if change is not None and change.is_noise and one.what in ("ppl", "zeroshot"):
                noise.append(f"{figure_name(one.what, one.name)} of {model}")
        if not speaks or (one.what, one.data) in told:
            continue
        told.add((one.what, one.data))
        if sentence := _cost(comparison, one):
            sentences.append(sentence)
            _cost_tile(comparison, one, tiles)
    if not any(change for one in comparison.figures for change in one.differences):
        return ["No quality figure can be compared between two models, so the cost is unknown."]
    return []


def _cost(comparison: Comparison, one: ComparedFigure) -> str:
    found = [
        f"{model} {_value(figure)} ({_change(change, one.what)})"
        for model, figure, change in zip(comparison.models, one.figures, one.differences, strict=True)
        if change is not None
    ]
    if not found:
        return ""
    what = f"Perplexity on {one.data}" if one.what == "ppl" else "Mean zero-shot accuracy"
    return f"{what}: {comparison.models[0]} {_value(one.figures[0])}, {', '.join(found)}."


def _value(figure: Figure | None) -> str:
    return shown_figure(None if figure is None else replace(figure, stderr=None))


def _cost_tile(comparison: Comparison, one: ComparedFigure, tiles: list[Tile]) -> None:
    """The best of the shortened models: what a user would take."""
    if any(
        tile.name in ("perplexity", "accuracy") for tile in tiles if (one.what == "ppl") == (tile.name == "perplexity")
    ):
        return
    known = [(c, m) for c, m in zip(one.differences, comparison.models, strict=True) if c is not None]
    change, model = known[-1]
    unit = "%" if one.what == "ppl" else " pts"
    if math.isfinite(change.value):
        name = "perplexity" if one.what == "ppl" else "accuracy"
        tiles.append(Tile(f"{100 * change.value:+z.1f}{unit}", name, model))


def _change(change: Difference, what: str) -> str:
    if not math.isfinite(change.value):
        return "too large for a number"
    unit = "%" if what == "ppl" else " points"
    error = "" if change.stderr is None else f" ±{100 * change.stderr:.2g}"
    return f"{100 * change.value:+z.1f}{unit}{error}"


def _noise(comparison: Comparison | None, noise: Sequence[str]) -> list[str]:
    changes = [change for one in comparison.figures for change in one.differences if change] if comparison else []
    unknown = sum(change.is_noise is None for change in changes)
    found = []
    if noise:
        more = f" and {len(noise) - _LISTED} more" if len(noise) > _LISTED else ""
        found.append(f"Within noise, so not reliable: {', '.join(noise[:_LISTED])}{more}.")
    elif changes and unknown < len(changes):
        found.append("None of these differences is within noise.")
    if unknown:
        found.append(f"The error of {unknown} difference{'s' if unknown > 1 else ''} is unknown.")
    return found


def _percent(share: float) -> str:
    return f"{share:+z.1%}"
