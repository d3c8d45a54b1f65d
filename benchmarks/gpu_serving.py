"""A 7B-shaped model at work on a GPU: dense, and with 26, 21, 17, 12 and 6 of its 32 blocks, at batch 1 to 256.

    python benchmarks/gpu_serving.py [--part eager|compiled|draft] [--small] [--folder DIR]

Weights are random (47 GB of checkpoints in DIR, deleted afterwards unless DIR is given). Memory and utilisation are measured,
too. `--small` is a tiny one on whatever there is, to try the script out. One JSON line per configuration; a part that was
interrupted resumes where DIR is given.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import shortstack
from common import random_llama, say
from retraining import with_tokenizer

KEPT = (26, 21, 17, 12, 6)
SEVEN = {"blocks": 32, "hidden": 4096, "mlp": 11008, "vocabulary": 32000}
SMALL = {"blocks": 32, "hidden": 128, "mlp": 352, "vocabulary": 1000}
FIGURES = (
    "latency", "prefill", "tpot", "throughput", "latency_variation", "prefill_floor_share", "tpot_floor_share",
    "prefill_speedup", "prefill_ideal", "prefill_of_ideal", "decode_speedup", "decode_ideal", "decode_of_ideal", "gpu",
    "gpu_memory", "gpu_memory_bytes_max", "temperature_max", "power", "throttled_max", "other_processes_max",
)  # fmt: skip


def checkpoints(folder: Path, shape: dict[str, int]) -> list[str]:
    """The dense one and its cuts: blocks go from behind, which makes no difference to the time."""
    dense = folder / "dense"
    if not dense.is_dir():
        random_llama(dense, dtype="bfloat16", shard_bytes=4 << 30, same_blocks=True, **shape)
        with_tokenizer(dense)
    found = [str(dense)]
    for kept in KEPT:
        cut = folder / f"kept-{kept}"
        if not cut.is_dir():
            shortstack.prune(str(dense), blocks=f"{kept}-{shape['blocks'] - 1}", out=cut, quiet=True)
        found.append(str(cut))
    return found


def sweep(models: list[str], folder: Path, engine: str, small: bool, batches: str) -> None:
    """Every model in turns, and one line of figures for each configuration."""
    new_tokens, runs, warmup = ("8", 3, 1) if small else ("128", 8, 3)
    results = shortstack.bench(
        *models, engine=engine, batch=batches, prompt_tokens=128, new_tokens=new_tokens, runs=runs, warmup=warmup,
        dtype="bfloat16", compare=True, out=folder / f"{engine}.json",
    ).results  # fmt: skip
    for result in results:
        figures = {name: result.figures[name].value for name in FIGURES if name in result.figures}
        say(
            f"{engine}, {Path(result.model).name}, batch {result.settings['batch']}", **figures,
            fits=result.figures["latency"].value is not None, peak_device_bytes=result.peak_device_bytes,
            peak_rss_bytes=result.peak_rss_bytes, blocks=result.settings["blocks"], machine=result.settings["machine"],
        )  # fmt: skip


def draft(models: list[str], folder: Path, small: bool) -> None:
    """The times that decide whether a draft pays; with random weights nothing but its cost means anything."""
    for path in models[1:]:
        (one,) = shortstack.bench(
            models[0], draft=path, draft_tokens=4, new_tokens="8" if small else "64", runs=3 if small else 8, warmup=1,
            dtype="bfloat16", out=folder / f"draft-{Path(path).name}.json",
        ).results  # fmt: skip
        names = ("draft_cost", "verify_cost", "break_even_length", "dense_rate", "draft_rate", "identical")
        say(f"draft {Path(path).name}", **{name: one.figures[name].value for name in names})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", choices=("eager", "compiled", "draft"), action="append")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        models = checkpoints(folder, SMALL if given.small else SEVEN)
        for part in given.part or ("eager", "compiled"):
            if part == "draft":
                draft(models, folder, given.small)
            elif part == "eager":
                sweep(models, folder, "transformers", given.small, "1,4" if given.small else "1,8,64,256")
            else:
                sweep([models[0], models[2], models[4]], folder, "compiled", given.small, "1" if given.small else "1,8")


if __name__ == "__main__":
    main()
