"""The layout of the published measurements: a folder per model and configuration, tables of comma-separated values."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shortstack.artifacts.csv_folder import MIB, model_folders, weights_mib, write_csv
from shortstack.artifacts.results import Result

_TIMES = (
    "time_mean(sec)", "time_std", "th_mean(tokens/s)", "th_std", "mem", "out_len", "in_len", "nbatches", "batchsz", "nparam",
)  # fmt: skip
_MEMORY = (
    "mem_gpu_mean", "mem_gpu_std", "mem_cpu_mean", "mem_cpu_std", "out_len", "in_len", "nbatches", "batchsz", "nparam",
)  # fmt: skip
_READINGS = ("timestamp", "temperature.gpu", "utilization.gpu [%]", "utilization.memory [%]", "memory.used [MiB]")


def write_published_csv(results: Sequence[Result], folder: Path) -> None:
    """Write MODEL/batch_gen_outN_bsB with latency_throughput.csv, memory_tracemalloc.csv and nvidia_smi_gpuutil.csv.

    Several engines have a folder each, above those of the models. What did not fit has no table. Deviations are of the
    population, memory is in MiB: as published. `mem` is what the weights take.
    """
    several = len({result.settings["engine"] for result in results}) > 1
    names = model_folders([result.model for result in results])
    for result in results:
        settings, latency = result.settings, result.per_item.get("latency", [])
        place = folder / str(settings["engine"]) if several else folder
        place = place / names[result.model] / f"batch_gen_out{settings['new_tokens']}_bs{settings['batch']}"
        if latency:
            write_csv(place / "latency_throughput.csv", _times(result, latency))
        if result.peak_rss_bytes:
            write_csv(place / "memory_tracemalloc.csv", _memory(result))
        readings = result.per_item.get("readings", [])
        if any("gpu" in reading for reading in readings):
            write_csv(place / "nvidia_smi_gpuutil.csv", _readings(readings))


def _times(result: Result, latency: Sequence[float]) -> list[Sequence[Any]]:
    throughput = result.per_item["throughput"]
    row = [
        statistics.fmean(latency), statistics.pstdev(latency), statistics.fmean(throughput), statistics.pstdev(throughput),
        weights_mib(result), *_common(result),
    ]  # fmt: skip
    return [_TIMES, row, latency]


def _memory(result: Result) -> list[Sequence[Any]]:
    on_device = (result.peak_device_bytes or 0) // MIB
    return [_MEMORY, [on_device, 0.0, result.peak_rss_bytes // MIB, 0.0, *_common(result, 1)]]


def _readings(readings: Sequence[dict[str, float]]) -> list[Sequence[Any]]:
    rows: list[Sequence[Any]] = [_READINGS]
    for reading in readings:
        rows.append(
            [
                f"{reading['seconds']:.1f}", round(reading.get("temperature", 0)), round(100 * reading["gpu"]),
                round(100 * reading.get("gpu_memory", 0)), round(reading.get("gpu_memory_bytes", 0) / MIB),
            ]
        )  # fmt: skip
    return rows


def _common(result: Result, runs: int | None = None) -> list[int]:
    settings = result.settings
    return [
        settings["new_tokens"], settings["prompt_tokens"], len(result.per_item.get("latency", [])) if runs is None else runs,
        settings["batch"], result.parameters,
    ]  # fmt: skip
