"""What scoring by ppl costs, against blocks, windows and hidden size; what it holds, against blocks.

    python benchmarks/scaling.py [--plot docs/images/scoring.png]

Processes on checkpoints of random float32 weights (vocabulary 8000, windows of 128). One JSON line per point; seconds are
those after imports, memory is the peak above a process that only imports torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from common import random_llama, random_windows, run, say, shortstack

BASE = {"blocks": 12, "windows": 10, "hidden": 512}
POINTS = {
    "blocks": [4, 8, 12, 16, 24, 32],
    "windows": [10, 25, 50, 100, 200],
    "hidden": [256, 384, 512, 768, 1024],
}
VOCABULARY, LENGTH = 8000, 128


def mlp_of(hidden: int) -> int:
    return hidden * 8 // 3 // 64 * 64


def operations(blocks: int, windows: int, hidden: int) -> float:
    """Of the matrix products that scoring needs, and no more."""
    block = 4 * hidden * hidden + 3 * hidden * mlp_of(hidden)
    per_token = blocks * (blocks + 1) / 2 * block + (blocks + 1) * VOCABULARY * hidden
    return 2.0 * windows * LENGTH * per_token


def point(folder: Path, bare: int, *, blocks: int, windows: int, hidden: int) -> dict[str, float]:
    model = random_llama(folder / "m", blocks=blocks, hidden=hidden, mlp=mlp_of(hidden), vocabulary=VOCABULARY)
    rows = random_windows(folder / "w.jsonl", count=windows, vocabulary=VOCABULARY)
    command = ["score", str(model), "--data", str(rows), "--samples", str(windows), "--memory", "streamed"]
    ran = run(shortstack(*command, "--out", str(folder / "s.json"), "--quiet"))
    seconds = json.loads((folder / "s.json").read_text())["seconds"]
    needed = operations(blocks, windows, hidden)
    found = {"seconds": seconds, "operations": needed, "GFLOPs": needed / seconds / 1e9}
    found["above_bare_MB"] = (ran.peak_bytes - bare) / 1e6
    found["model_MB"] = (model / "model.safetensors").stat().st_size / 1e6
    shutil.rmtree(model)
    return found


def plot(found: dict[str, list[dict[str, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg" if path.suffix == ".svg" else "agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(14, 3.4), constrained_layout=True)
    titles = {"blocks": "blocks", "windows": "windows of 128 tokens", "hidden": "hidden size"}
    for axis, (name, title) in zip(axes, titles.items(), strict=False):
        points = found[name]
        xs = [point[name] for point in points]
        axis.plot(xs, [point["seconds"] for point in points], "o-", label="measured")
        rate = max(point["GFLOPs"] for point in points) * 1e9
        axis.plot(xs, [point["operations"] / rate for point in points], ":", color="grey",
                  label=f"matrix products alone,\nat {rate / 1e9:.0f} GFLOP/s")  # fmt: skip
        axis.set(xlabel=title, title=f"time against {name}" if name != "hidden" else "time against hidden size")
    axes[0].set_ylabel("seconds")
    points = found["blocks"]
    xs = [point["blocks"] for point in points]
    axes[3].plot(xs, [point["model_MB"] for point in points], ":", color="grey", label="the model itself")
    axes[3].plot(xs, [point["above_bare_MB"] for point in points], "o-", label="peak of the run, streamed")
    axes[3].set(xlabel="blocks", ylabel="MB", title="memory against blocks")
    for axis in axes:
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False, fontsize="small")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Scoring all blocks by ppl; where not varied: {BASE['blocks']} blocks, {BASE['windows']} windows, "
                    f"hidden size {BASE['hidden']}", fontsize="medium")  # fmt: skip
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    bare = run([sys.executable, "-c", "import torch, transformers"]).peak_bytes
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        for varied, values in POINTS.items():
            for value in values:
                at = BASE | {varied: value}
                figures = at | point(Path(name), bare, **at)
                found.setdefault(varied, []).append(figures)
                say(f"scaling with {varied}", **figures)
    if arguments.plot is not None:
        plot(found, arguments.plot)


if __name__ == "__main__":
    main()
