"""Pruning side by side with `cp -r && sync`: time and peak memory; start-up of a small one and of --help.

    python benchmarks/pruning.py [--gigabytes 2.5] [--runs 3] [--folder DIR]

The checkpoint is made of random bfloat16 weights in shards and removed afterwards. Hashing, the check for values that
are not finite, and reading back what was written are on: they cannot be switched off.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from common import random_llama, run, say, shortstack


def prune(model: Path, out: Path) -> list[str]:
    return shortstack("prune", str(model), "--blocks", "3", "--out", str(out), "--quiet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.5)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        hidden, mlp = 2048, 5632
        block = 2 * (4 * hidden * hidden + 3 * hidden * mlp)
        blocks = max(4, round((arguments.gigabytes * 1e9 - 4 * 32000 * hidden) / block))
        model = random_llama(
            folder / "model", blocks=blocks, hidden=hidden, mlp=mlp, dtype="bfloat16", shard_bytes=500_000_000
        )
        nbytes = sum(path.stat().st_size for path in model.iterdir())
        ours, copies, peaks = [], [], []
        for _ in range(arguments.runs):
            run(["sync"])
            copies.append(run(["sh", "-c", f"cp -r '{model}' '{folder}/copy' && sync"]).seconds)
            shutil.rmtree(folder / "copy")
            run(["sync"])
            ran = run(prune(model, folder / "pruned"))
            ours.append(ran.seconds)
            peaks.append(ran.peak_bytes)
            kept = sum(path.stat().st_size for path in (folder / "pruned").iterdir())
            shutil.rmtree(folder / "pruned")
        pairs = [a / b for a, b in zip(ours, copies, strict=True)]
        say(
            "prune against cp -r && sync",
            input_GB=nbytes / 1e9,
            output_GB=kept / 1e9,
            seconds=statistics.median(ours),
            cp_seconds=statistics.median(copies),
            ratio=statistics.median(pairs),
            ratio_per_byte_written=statistics.median(pairs) * nbytes / kept,
            ratios=[round(pair, 2) for pair in pairs],
            peak_MB=max(peaks) / 1e6,
        )
        shutil.rmtree(model)
        small = random_llama(folder / "small", blocks=6, hidden=64, mlp=128, vocabulary=256)
        times = []
        for number in range(5):
            times.append(run(prune(small, folder / f"small-{number}")).seconds)
        say("prune a small checkpoint, start-up included", seconds=statistics.median(times), limit=1.0)
        started = [run(shortstack("--help")).seconds for _ in range(7)]
        say("shortstack --help", seconds=statistics.median(started), limit=0.3)
        python = [run([sys.executable, "-c", "pass"]).seconds for _ in range(7)]
        say("an empty Python process", seconds=statistics.median(python), measured_at=time.strftime("%Y-%m-%d"))


if __name__ == "__main__":
    main()
