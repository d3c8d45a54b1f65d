"""What a sweep found, as results: figures with errors, floors and ideals, per-run values; and as a table."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from shortstack.artifacts.results import Figure, Result, Results, shown_figure
from shortstack.benchmark.floors import Machine
from shortstack.benchmark.options import Sweep
from shortstack.benchmark.sweep import Measured
from shortstack.benchmark.tables import SPEEDS, latency_table, speedup_table
from shortstack.benchmark.timing import UNSTEADY, median_figure, paired_ratio, percentile, variation
from shortstack.benchmark.utilisation import UNITS, summary
from shortstack.benchmark.work import ITEM_BYTES, cut_of
from shortstack.common.formatting import table
from shortstack.runtime.memory import Usage

WHAT = "bench"
# The per-run values that are paired in comparisons -> their unit.
_PER_RUN = {
    "latency": "s", "prefill": "s", "decode": "s", "tpot": "s", "throughput": "tokens/s", "prefill_rate": "tokens/s",
    "decode_rate": "tokens/s", "device_latency": "s",
}  # fmt: skip


@dataclass(frozen=True)
class BenchResults(Results):
    """Results of a sweep, which print as one table per engine."""

    exit_code: int = 0

    def to_text(self) -> str:
        """A table per engine; speed-ups below it, where they were requested."""
        parts = []
        for engine in dict.fromkeys(str(result.settings["engine"]) for result in self.results):
            own = [result for result in self.results if result.settings["engine"] == engine]
            sampled = [result for result in own if "batch" in result.settings]
            if sampled:
                speedups = speedup_table(sampled)
                parts += [latency_table(sampled).to_text(), *(["", speedups.to_text()] if speedups else [])]
            parts += [_draft_text(result) for result in own if "draft" in result.settings]
        notes = dict.fromkeys(note for result in self.results for note in result.notes)
        return "\n".join([*parts, *(f"note: {note}" for note in notes), *self.time_line()])


def result_of(one: Measured, sweep: Sweep) -> Result:
    """The record of one model in one engine and configuration."""
    subject, workload = one.subject, one.workload
    label = f"{one.engine}, {workload.label}"
    per_item = _per_run(one)
    figures = {name: median_figure(values, _PER_RUN[name]) for name, values in per_item.items()}
    notes = list(one.notes)
    if one.does_not_fit:
        notes.append(f"{subject.name}: {one.engine}, {workload.label}: does not fit: {one.does_not_fit}")
        figures = {"latency": Figure(None, None, "s", 0, f"does not fit: {one.does_not_fit}")}
    else:
        figures |= _spread(per_item["latency"]) | _floors(one, figures)
    if one.served_rate is not None:
        figures["served_rate"] = Figure(
            one.served_rate, None, "tokens/s", 1, "many requests, by the engine's own measure"
        )
    figures |= _memory(one.memory)
    readings = one.memory.get("readings") or []
    peaks = (int(one.memory.get(name) or 0) for name in ("peak_rss_bytes", "peak_device_bytes"))
    rss, on_device = peaks
    return subject.result(
        WHAT,
        Usage(sum(per_item.get("latency", [])), rss, on_device or None),
        data={"source": label, "sha256": hashlib.sha256(label.encode()).hexdigest(), "rows": len(one.samples)},
        settings=_settings(one, sweep),
        figures=figures,
        per_item={**per_item, **({"readings": readings} if readings else {})},
        notes=notes,
    )


def _settings(one: Measured, sweep: Sweep) -> dict[str, Any]:
    import torch

    workload, subject_dtype = one.workload, one.subject.settings["dtype"]
    return {
        "engine": one.engine, "engine_version": one.version, "batch": workload.batch,
        "prompt_tokens": workload.prompt_tokens, "prompt": workload.prompt, "new_tokens": workload.new_tokens,
        "sampling": workload.sampling, "seed": workload.seed, "runs": sweep.runs, "warmup": sweep.warmup,
        "dtype": one.precision or subject_dtype, "threads": torch.get_num_threads(), "blocks": one.subject.checkpoint.depth,
        "machine": None if one.machine is None else {
            "bytes_per_second": one.machine.bytes_per_second, "operations_per_second": one.machine.operations_per_second,
        },
    }  # fmt: skip


def _per_run(one: Measured) -> dict[str, list[float]]:
    samples, workload = one.samples, one.workload
    if not samples:
        return {}
    found = {
        "latency": [sample.seconds for sample in samples],
        "prefill": [sample.prefill_seconds for sample in samples],
        "throughput": [workload.batch * workload.new_tokens / sample.seconds for sample in samples],
        "prefill_rate": [workload.batch * workload.prompt_tokens / sample.prefill_seconds for sample in samples],
    }
    if all(sample.steps > 0 and sample.decode_seconds > 0 for sample in samples):
        found |= {
            "decode": [sample.decode_seconds for sample in samples],
            "tpot": [sample.decode_seconds / sample.steps for sample in samples],
            "decode_rate": [workload.batch * sample.steps / sample.decode_seconds for sample in samples],
        }
    on_device = [sample.device_seconds for sample in samples if sample.device_seconds is not None]
    return {**found, "device_latency": on_device} if len(on_device) == len(samples) else found


def _spread(latency: Sequence[float]) -> dict[str, Figure]:
    count = len(latency)
    found = {
        f"latency_p{round(100 * share)}": Figure(percentile(latency, share), None, "s", count)
        for share in (0.1, 0.9, 0.99)
    }
    spread = variation(latency)
    note = f"unsteady: above {UNSTEADY:.0%}" if spread is not None and spread > UNSTEADY else ""
    note = "unknown for a single run" if spread is None else note
    return {
        **found,
        "latency_mean": Figure(statistics.fmean(latency), None, "s", count),
        "latency_variation": Figure(spread, None, "share", count, note),
    }


def _floors(one: Measured, figures: dict[str, Figure]) -> dict[str, Figure]:
    """The least time that the machine allows, and how much of the measured time it is."""
    work = one.work
    if one.machine is None or work.unknown:
        why = work.unknown or "not measured"
        return {name: Figure(None, None, "s", 0, why) for name in ("prefill_floor", "tpot_floor")}
    machine: Machine = one.machine
    floors = {
        "prefill": machine.prefill_seconds(work, one.workload), "tpot": machine.step_seconds(work, one.workload),
    }  # fmt: skip
    found = {}
    reference = one.subject.settings["dtype"]
    if ITEM_BYTES.get(one.precision or reference) != ITEM_BYTES.get(reference):
        del floors["prefill"]
        found["prefill_floor"] = Figure(None, None, "s", 0, f"the machine's products were measured in {reference}")
    for name, floor in floors.items():
        measured = figures.get(name)
        if measured is not None and measured.value:
            found[f"{name}_floor"] = Figure(floor, None, "s", 1)
            found[f"{name}_floor_share"] = Figure(floor / measured.value, None, "share", measured.n)
    return found


def _memory(memory: dict[str, Any]) -> dict[str, Figure]:
    found = {}
    for name in ("load_peak_bytes", "peak_rss_bytes", "peak_device_bytes"):
        if memory.get(name):
            found[name] = Figure(float(memory[name]), None, "bytes", 1)
    readings = memory.get("readings") or []
    for name, (mean, most) in summary(readings).items():
        found[name] = Figure(mean, None, UNITS.get(name, ""), len(readings))
        found[f"{name}_max"] = Figure(most, None, UNITS.get(name, ""), len(readings))
    return found


def with_speedups(results: Sequence[Result], measured: Sequence[Measured]) -> list[Result]:
    """The results with how many times as fast each model is as the first, and with the ideal beside it."""
    compared = []
    for result, one in zip(results, measured, strict=True):
        at = next(
            n
            for n, other in enumerate(measured)
            if (other.engine, other.workload.label) == (one.engine, one.workload.label)
        )
        base, dense = results[at], measured[at]
        if dense is one:
            compared.append(result)
            continue
        compared.append(replace(result, figures={**result.figures, **_speedup_figures(base, result, dense, one)}))
    return compared


def _speedup_figures(base: Result, result: Result, dense: Measured, one: Measured) -> dict[str, Figure]:
    ideals, why = ideal_speedups(dense, one)
    found = {}
    for name in SPEEDS:
        speedup = paired_ratio(base.per_item.get(name, []), result.per_item.get(name, []))
        ideal = ideals.get(name)
        found[f"{name}_speedup"] = speedup
        found[f"{name}_ideal"] = Figure(ideal, None, "times", 0, why if ideal is None else "")
        if ideal is not None and speedup.value is not None:
            error = speedup.stderr / ideal if speedup.stderr is not None else None
            found[f"{name}_of_ideal"] = Figure(speedup.value / ideal, error, "share", speedup.n)
    return found


def ideal_speedups(dense: Measured, one: Measured) -> tuple[dict[str, float], str]:
    """(name -> how many times as fast it would be if only what blocks, head and cache cost mattered, why not where empty).

    Prefill is by operations, where the head counts once a sequence; decoding by bytes, weights and cache. The whole run is
    what the dense model's parts would take, each faster by its own ideal.
    """
    work = dense.work
    kept = cut_of(dense.subject.checkpoint, one.subject.checkpoint)
    other = one.work if kept is None else work.without(kept)
    if work.unknown or other.unknown:
        return {}, work.unknown or other.unknown
    workload = dense.workload
    found = {
        "prefill": work.prefill_operations(workload) / other.prefill_operations(workload),
        "decode": work.step_bytes(workload) / other.step_bytes(workload),
    }
    if dense.samples:
        parts = [statistics.median(sample.prefill_seconds for sample in dense.samples),
                 statistics.median(sample.decode_seconds for sample in dense.samples)]  # fmt: skip
        found["latency"] = sum(parts) / (parts[0] / found["prefill"] + parts[1] / found["decode"])
    return found, ""


def _draft_text(result: Result) -> str:
    names = {name: name.replace("_", " ") for name in result.figures}
    rows = [
        [names[name] + (", tokens/s" if figure.unit == "tokens/s" else ""), shown_figure(figure)]
        for name, figure in result.figures.items()
    ]
    notes = [f"{names[name]}: {figure.note}" for name, figure in result.figures.items() if figure.note]
    head = f"{result.model} with {result.settings['draft']} as its draft, {result.settings['draft_tokens']} tokens at a time"
    return "\n".join([head, table(["", "value"], rows), *notes])
