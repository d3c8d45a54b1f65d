"""The page: everything that was found, laid out by a template that escapes all of it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortstack.artifacts.plan import PrunePlan
from shortstack.artifacts.ranking_text import ranking_table
from shortstack.artifacts.results import Result, Results
from shortstack.artifacts.scores import Scores
from shortstack.artifacts.source_table import sources_table
from shortstack.artifacts.training import before_and_after_table
from shortstack.baselines.figures import published_result
from shortstack.benchmark.tables import latency_table, speedup_table
from shortstack.common.formatting import count, ranges, size
from shortstack.common.json_fields import nested
from shortstack.common.tables import Table
from shortstack.evaluation.compare import compared
from shortstack.evaluation.comparison import Comparison
from shortstack.publishing.report.again import commands
from shortstack.publishing.report.charts import bars_svg, curves_svg, heat_svg, points_svg
from shortstack.publishing.report.material import Material
from shortstack.publishing.report.names import NamedModel, named, shared, shown
from shortstack.publishing.report.plots import (
    Bars,
    Curves,
    HeatMap,
    Points,
    difference_points,
    latency_bars,
    memory_bars,
    score_bars,
    source_map,
    speedup_points,
    training_curves,
)
from shortstack.publishing.report.verdict import Verdict, verdict

TEMPLATES = Path(__file__).parent / "templates"
_QUALITY = ("ppl", "zeroshot", "generation")
_POLICY = "default-src 'none'; style-src 'sha256-{}'; img-src data:; base-uri 'none'; form-action 'none'"


@dataclass(frozen=True)
class Report:
    """A report before it is laid out.

    Attributes:
        material: what it is made of.
        models, results: measured models, and their results under the names of the page.
        comparison: of quality; None where there are not two models to compare.
        verdict: the first paragraph.
        notices: what a reader must know first.
    """

    material: Material
    models: list[NamedModel]
    results: list[Result]
    comparison: Comparison | None
    verdict: Verdict
    notices: list[str]

    @property
    def title(self) -> str:
        """What was done to which model."""
        plan = self.material.plan
        if plan is not None and plan.removed:
            return f"{shown(plan.source)} without {len(plan.removed)} of its {len(plan.blocks)} blocks"
        if plan is not None:
            return shown(plan.source)
        sources = [shown(one.source) for one in self.material.scores] + [one.name for one in self.models]
        return sources[0] if sources else ", ".join(self.material.trainings)

    @property
    def bench(self) -> list[Result]:
        """Results of speed and memory, without those of drafting."""
        return [one for one in self.results if one.what == "bench" and "draft" not in one.settings]

    def plots(self) -> list[Bars | Points | Curves | HeatMap]:
        """Everything that is drawn."""
        plan = self.material.plan
        removed, protected = (plan.removed, plan.protected) if plan is not None else ((), ())
        found: list[Bars | Points | Curves | HeatMap | None] = []
        for scores in self.material.scores:
            for one in scores.criteria.values():
                found.append(score_bars(one, removed, protected, scores.calibration.get("samples", 0)))
                found.append(source_map(one, removed, protected))
        found += difference_points(self.comparison) if self.comparison is not None else []
        found += [training_curves(name, log) for name, log in self.material.trainings.items()]
        found += [*latency_bars(self.bench), memory_bars(self.bench), speedup_points(self.bench)]
        return [one for one in found if one is not None]


def make_report(material: Material, published: Sequence[str]) -> Report:
    """Compare what was measured, and put it into words.

    Args:
        material: what was found.
        published: names of published figures to put beside it, besides those that a comparison among the files names.

    Raises:
        ShortstackError: there is no published figure of such a name.
    """
    models, results = named(material)
    beside = [published_result(name) for name in dict.fromkeys([*published, *material.published])]
    quality = [one for one in results if one.what in _QUALITY]
    labels = {one.label for one in models}
    measured = list(dict.fromkeys(one.model for one in quality))
    comparison = None
    if quality and (len(measured) > 1 or beside):
        first = next((one.label for one in models if one.label in measured), None)
        comparison = compared(quality, first if len(labels) > 1 else None, beside)
    bench = [one for one in results if one.what == "bench" and "draft" not in one.settings]
    words = verdict(material, models, comparison, bench)
    return Report(material, models, results, comparison, words, _notices(material, models))


def _notices(material: Material, models: Sequence[NamedModel]) -> list[str]:
    """What does not fit together, as far as the records say."""
    if material.dense_fingerprint is None or not models:
        return []
    found = []
    strangers = [one.label for one in models if not one.role]
    if not any(one.role == "dense" for one in models):
        found.append(
            f"There is no result of the dense model, so differences are relative to {models[0].label}, and the cost of "
            "pruning is unknown."
        )
    if strangers and (material.histories or len(strangers) > 1):
        found.append(
            f"No record shows how {', '.join(strangers)} {'was' if len(strangers) == 1 else 'were'} made: "
            f"{'its' if len(strangers) == 1 else 'their'} figures may be of another model."
        )
    return found


def page(report: Report) -> str:
    """The report as one HTML file that fetches nothing and runs nothing."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, finalize=_finalized,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    style = (TEMPLATES / "page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    drawn = {"bars": bars_svg, "points": points_svg, "curves": curves_svg, "heat": heat_svg}
    text: str = environment.get_template("page.html").render(
        report=report, plan=report.material.plan, style=Markup(style), policy=Markup(_POLICY.format(digest)),
        **drawn, **_removed(report), **_quality(report), **_speed(report), **_rest(report),
    )  # fmt: skip
    return text


def _finalized(value: Any) -> Any:
    """Whatever the template prints: nobody's paths, no control characters; markup is what charts and samples made."""
    return value if hasattr(value, "__html__") or not isinstance(value, str) else shared(value)


def _removed(report: Report) -> dict[str, Any]:
    material, plan = report.material, report.material.plan
    removed, protected = (plan.removed, plan.protected) if plan is not None else ((), ())
    rankings = [
        {
            "found": one,
            "plot": score_bars(one, removed, protected, scores.calibration.get("samples", 0)),
            "table": ranking_table(one, protected),
            "sources": source_map(one, removed, protected),
            "sources_table": sources_table(one) if one.sources else None,
        }
        for scores in material.scores
        for one in scores.criteria.values()
    ]
    return {
        "strip": _strip(plan),
        "sizes": plan.sizes() if plan is not None and plan.before else None,
        "rankings": rankings,
        "calibrations": [line for scores in material.scores if (line := _calibration(scores))],
        "removed": removed,
        "protected": protected,
        "ranges": ranges,
    }


def _strip(plan: PrunePlan | None) -> list[tuple[int, str]]:
    """Every block, and whether it is removed, protected or kept."""
    if plan is None:
        return []
    gone, guarded = set(plan.removed), set(plan.protected)
    return [
        (block, "removed" if block in gone else "protected" if block in guarded else "kept") for block in plan.blocks
    ]


def _calibration(scores: Scores) -> str:
    made = scores.calibration
    if not made.get("samples"):
        return "The scores were computed from the weights alone." if made else ""
    each = " each" if made.get("sources") else ""
    windows = (
        f"{made.get('samples')} windows{each} of {made.get('seq_len')} tokens from {shown(str(made.get('source')))}"
    )
    seed = f", seed {made['seed']}" if made.get("seed") is not None else ""
    dtype = scores.settings.get("dtype", "an unrecorded precision")
    return f"The scores were computed on {windows} ({made.get('sampling')}{seed}), in {dtype}."


def _quality(report: Report) -> dict[str, Any]:
    quality = [one for one in report.results if one.what in _QUALITY]
    comparison = report.comparison
    tables = comparison.tables() if comparison is not None else Results(tuple(quality)).tables() if quality else []
    legend = comparison.reading() if comparison is not None else []
    notes = list(dict.fromkeys([*legend, *(note for one in quality for note in one.notes)]))
    return {
        "quality_tables": tables,
        "quality_notes": notes,
        "quality_plots": difference_points(comparison) if comparison is not None else [],
        "trainings": [
            {
                "name": name,
                "plot": training_curves(name, log),
                "table": before_and_after_table(log.models)
                if any(one["figures"] for one in log.models.values())
                else None,
            }
            for name, log in report.material.trainings.items()
        ],
    }


def _speed(report: Report) -> dict[str, Any]:
    bench = report.bench
    tables: list[Table] = []
    for engine in dict.fromkeys(str(one.settings["engine"]) for one in bench):
        own = [one for one in bench if one.settings["engine"] == engine]
        speedups = speedup_table(own)
        tables += [latency_table(own), *([speedups] if speedups is not None else [])]
    return {
        "speed_tables": tables,
        "speed_notes": list(dict.fromkeys(note for one in bench for note in one.notes)),
        "latency_plots": latency_bars(bench),
        "memory_plot": memory_bars(bench),
        "speedup_plot": speedup_points(bench),
        "speed_rest": len({str(one.data.get("source", "")) for one in bench}) - len(latency_bars(bench)),
    }


def _rest(report: Report) -> dict[str, Any]:
    from markupsafe import escape

    material = report.material
    return {
        "samples": _samples(report.results),
        "models_table": Table(
            ["", "name", "parameters", "size", "fingerprint"],
            [
                [one.label, one.name, count(one.parameters), size(one.nbytes), one.fingerprint[:12]]
                for one in report.models
            ],
        ),
        "files_table": Table(
            ["file", "kind", "sha256"], [[escape(one.name), one.kind, one.sha256[:12]] for one in material.files]
        ),
        "left_out": [escape(one) for one in material.left_out],
        "versions": _versions(material),
        "commands": commands(material, report.results),
    }


def _samples(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Per prompt and number of the sample, what each model wrote; texts are escaped and otherwise as they are."""
    from markupsafe import escape

    prompts: dict[str, list[Result]] = {}
    for result in results:
        if result.what == "samples":
            prompts.setdefault(str(result.settings.get("prompt", "")), []).append(result)
    return [
        {
            "prompt": escape(prompt),
            "rows": [
                [
                    (one.model, escape(one.per_item["texts"][at]))
                    for one in group
                    if at < len(one.per_item.get("texts", []))
                ]
                for at in range(max(len(one.per_item.get("texts", [])) for one in group))
            ],
        }
        for prompt, group in prompts.items()
    ]


def _versions(material: Material) -> str:
    """Of the programs that computed, as the records name them."""
    found: dict[str, dict[str, None]] = {}
    recorded: list[Any] = [scores.settings.get("versions") for scores in material.scores]
    recorded += [step.get("versions") for history in material.histories for step in history.record["steps"]]
    recorded += [nested(material.run, "steps", name, "key", "versions") for name in material.run.get("order", [])]
    for versions in recorded:
        for name, version in (versions if isinstance(versions, Mapping) else {}).items():
            found.setdefault(str(name), {})[str(version)] = None
    return ", ".join(f"{name} {' and '.join(versions)}" for name, versions in found.items())
