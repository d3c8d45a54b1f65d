"""Pictures of a sweep: latency and memory against the batch; speed-up against the blocks removed, beside the ideal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shortstack.artifacts.results import Result
from shortstack.common.pictures import drawing, png
from shortstack.runtime.atomic_output import write_file


def write_plots(results: Sequence[Result], folder: Path) -> list[Path]:
    """Write the pictures that the results have figures for, as PNG; their paths."""
    written = []
    for engine in dict.fromkeys(str(result.settings["engine"]) for result in results):
        own = [result for result in results if result.settings["engine"] == engine and "batch" in result.settings]
        title = (
            f"{engine} {own[0].settings['engine_version']}, {own[0].settings['dtype']} on {own[0].settings['device']}"
        )
        pictures = {
            "latency": _against_batch(own, _latency, "latency (s)", title),
            "memory": _against_batch(own, _gigabytes, "peak memory (GB)", title),
            "speedup": _against_blocks(own, title),
        }
        for name, picture in pictures.items():
            if picture is not None:
                path = folder / f"{engine.replace('.', '')}-{name}.png"
                write_file(path, picture)
                written.append(path)
    return written


def _latency(result: Result) -> float | None:
    return result.figures["latency"].value


def _gigabytes(result: Result) -> float | None:
    held = result.peak_device_bytes or result.peak_rss_bytes
    return held / 1e9 if held else None


def _against_batch(results: Sequence[Result], value: Any, label: str, title: str) -> bytes | None:
    """A line per model and number of new tokens."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for result in results:
        found = value(result)
        if found is not None:
            name = f"{result.model}, {result.settings['new_tokens']} new tokens"
            lines.setdefault(name, []).append((result.settings["batch"], found))
    if not lines:
        return None
    figure, axes = _axes(title, "batch", label)
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), "o-", label=name, markersize=4)
    if len({batch for points in lines.values() for batch, _ in points}) > 1:
        axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    return _png(figure, axes)


def _against_blocks(results: Sequence[Result], title: str) -> bytes | None:
    """Prefill and decode speed-up of each model over the first, with its errors and the ideal."""
    if not any("prefill_speedup" in result.figures for result in results):
        return None
    figure, axes = _axes(title, "blocks removed", "times as fast")
    dense = max(result.settings["blocks"] for result in results)
    shapes = dict.fromkeys((result.settings["batch"], result.settings["new_tokens"]) for result in results)
    for number, (batch, new_tokens) in enumerate(shapes):
        own = [r for r in results if (r.settings["batch"], r.settings["new_tokens"]) == (batch, new_tokens)]
        for part, marker, colour in (("prefill", "o", 2 * number), ("decode", "s", 2 * number + 1)):
            pairs = ((dense - r.settings["blocks"], r.figures) for r in own if _has(r, part))
            found = sorted(pairs, key=lambda pair: pair[0])
            if not found:
                continue
            removed = [0, *(blocks for blocks, _ in found)]
            speedups = [figures[f"{part}_speedup"] for _, figures in found]
            axes.errorbar(
                removed, [1, *(one.value for one in speedups)], [0, *(one.stderr or 0 for one in speedups)], fmt=f"{marker}-",
                color=f"C{colour}", markersize=4, capsize=3, label=f"{part}, batch {batch}, {new_tokens} new tokens",
            )  # fmt: skip
            ideal = [figures[f"{part}_ideal"].value for _, figures in found]
            if all(value is not None for value in ideal):
                axes.plot(removed, [1, *ideal], ":", color=f"C{colour}", label=f"{part}, ideal")
    axes.set_xticks(sorted({0, *(dense - result.settings["blocks"] for result in results)}))
    return _png(figure, axes)


def _has(result: Result, part: str) -> bool:
    speedup = result.figures.get(f"{part}_speedup")
    return speedup is not None and speedup.value is not None


def _axes(title: str, x: str, y: str) -> tuple[Any, Any]:
    figure, axes = drawing(title, x, y)
    axes.grid(alpha=0.3)
    return figure, axes


def _png(figure: Any, axes: Any) -> bytes:
    axes.legend(fontsize=7)
    return png(figure)
