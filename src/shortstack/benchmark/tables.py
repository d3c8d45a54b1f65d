"""The tables of a sweep: times, floors and memory; speed-ups beside the ideal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from shortstack.artifacts.results import Figure, Result, shown_figure
from shortstack.benchmark.timing import UNSTEADY
from shortstack.common.formatting import counted, seconds, size
from shortstack.common.tables import Table

SPEEDS = ("latency", "prefill", "decode")  # of which --compare gives speed-ups
_UNSTEADY = "!"


def _head(results: Sequence[Result]) -> str:
    settings = results[0].settings
    where = f"{settings['dtype']} on {settings['device']}"
    if settings["device"] == "cpu":
        where += f", {counted(settings['threads'], 'thread')}"
    version = f" {settings['engine_version']}" if settings.get("engine_version") else ""
    lines = [
        f"{settings['engine']}{version}, {where}; {counted(settings['runs'], 'run')} after {settings['warmup']} of warm-up; "
        f"{settings['sampling']} sampling; {settings['prompt']}"
    ]
    machine = settings.get("machine")
    if machine:
        lines.append(
            f"the machine reached {machine['bytes_per_second'] / 1e9:.3g} GB/s and "
            f"{machine['operations_per_second'] / 1e9:.3g} GFLOP/s in the same minutes"
        )
    return "\n".join(lines)


def latency_table(results: Sequence[Result]) -> Table:
    """Times, floors and memory of each model in each configuration of one engine."""
    header = [
        "model", "batch", "new", "latency", "P10", "P90", "P99", "spread", "first token", "floor", "per token", "floor",
        "tokens/s", "memory",
    ]  # fmt: skip
    rows = []
    for result in results:
        figures = result.figures
        spread = figures.get("latency_variation")
        unsteady = spread is not None and spread.value is not None and spread.value > UNSTEADY
        rows.append(
            [
                result.model, str(result.settings["batch"]), str(result.settings["new_tokens"]),
                _time(figures, "latency") if figures["latency"].value is not None else "does not fit",
                *(_time(figures, f"latency_p{share}") for share in (10, 90, 99)),
                shown_figure(spread) + (_UNSTEADY if unsteady else ""),
                _time(figures, "prefill"), _share(figures, "prefill_floor_share"),
                _time(figures, "tpot"), _share(figures, "tpot_floor_share"),
                shown_figure(figures.get("throughput")), _held(result),
            ]
        )  # fmt: skip
    lines = []
    if any(row[7].endswith(_UNSTEADY) for row in rows):
        lines.append(
            f"{_UNSTEADY} the spread (standard deviation over mean) is above {UNSTEADY:.0%}: repeat it on a quiet machine"
        )
    lines.append("floor: how much of the measured time the machine's bandwidth or matrix products need at least")
    return Table(header, rows, _head(results), lines, keys=3)


def speedup_table(results: Sequence[Result]) -> Table | None:
    """How many times as fast as the first each model is, beside the ideal; None where that was not requested."""
    compared = [result for result in results if "latency_speedup" in result.figures]
    if not compared:
        return None
    rows = []
    for result in compared:
        cells = [
            result.model,
            str(result.settings["batch"]),
            str(result.settings["new_tokens"]),
            str(result.settings["blocks"]),
        ]
        for name in SPEEDS:
            cells += [shown_figure(result.figures.get(f"{name}_{what}")) for what in ("speedup", "ideal", "of_ideal")]
        rows.append(cells)
    header = ["times as fast as " + results[0].model, "batch", "new", "blocks"]
    for name in SPEEDS:
        header += [name, "ideal", "of it"]
    return Table(header, rows, keys=3)


def _time(figures: dict[str, Figure], name: str) -> str:
    figure = figures.get(name)
    if figure is None or figure.value is None or not math.isfinite(figure.value):
        return "-"
    return f"{1000 * figure.value:.3g} ms" if figure.value < 1 else seconds(figure.value)


def _share(figures: dict[str, Figure], name: str) -> str:
    figure = figures.get(name)
    return "-" if figure is None or figure.value is None else f"{figure.value:.0%}"


def _held(result: Result) -> str:
    held = result.peak_device_bytes or result.peak_rss_bytes
    return size(held) if held else "-"
