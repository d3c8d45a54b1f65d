"""This checkout against another one, in pairs: a change that costs time shows itself before it lands.

    git worktree add ../before COMMIT
    python benchmarks/pairs.py ../before [--runs 6] [--gigabytes 2.5] [--only score]

The same command is run with both checkouts in turn (new, old, old, new, ...), as processes, with this Python: scoring 16
blocks of width 768 (random float32 weights, 10 windows of 128), pruning a bfloat16 checkpoint in shards, and the start of a
small command. One JSON line per command: the ratio new / old of each pair's seconds (median, smallest, largest), of
processor time and of peak memory. Exit code 1 where a median of seconds is more than 5 % above 1. Quote seconds only from
a machine with nothing else to do.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from common import Goals, Ran, random_llama, random_windows, run

HERE = Path(__file__).resolve().parents[1]
LIMIT = 1.05


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def turn(checkout: Path, command: list[str], out: Path) -> Ran:
    """One process that imports shortstack from `checkout`; its output is removed."""
    run(["sync"])
    program = ["env", f"PYTHONPATH={checkout / 'src'}", sys.executable, "-m", "shortstack"]
    ran = run([*program, *command, "--out", str(out), "--quiet"])
    remove(out)
    return ran


def pairs(goals: Goals, name: str, once: Callable[[Path], Ran], old: Path, runs: int) -> None:
    for checkout in (HERE, old):
        once(checkout)
    new_turns, old_turns = [], []
    for number in range(runs):
        for checkout in (HERE, old) if number % 2 == 0 else (old, HERE):
            (new_turns if checkout == HERE else old_turns).append(once(checkout))
    seconds = [new.seconds / before.seconds for new, before in zip(new_turns, old_turns, strict=True)]
    processor = [
        new.processor_seconds / before.processor_seconds for new, before in zip(new_turns, old_turns, strict=True)
    ]
    goals.figure(
        f"{name}: new / old, median of {runs} pairs",
        statistics.median(seconds),
        at_most=LIMIT,
        smallest=min(seconds),
        largest=max(seconds),
        new_seconds=statistics.median(new.seconds for new in new_turns),
        old_seconds=statistics.median(before.seconds for before in old_turns),
        processor_ratio=statistics.median(processor),
        processor_smallest=min(processor),
        processor_largest=max(processor),
        peak_memory_ratio=max(new.peak_bytes for new in new_turns) / max(before.peak_bytes for before in old_turns),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, help="the other checkout")
    parser.add_argument("--runs", type=int, default=6, help="pairs of each command")
    parser.add_argument("--gigabytes", type=float, default=2.5, help="size of the checkpoint that is pruned")
    parser.add_argument("--only", default="", help="the commands whose line holds this text, such as score")
    arguments = parser.parse_args()
    old, goals = arguments.old.resolve(), Goals()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, windows = random_llama(folder / "model", blocks=16), random_windows(folder / "windows.jsonl")
        score = ["score", str(model), "--data", str(windows), "--criterion"]
        for criteria, *options in (
            ["ppl"],
            ["taylor", "--memory", "streamed"],
            ["taylor", "--memory", "resident"],
            ["ppl,taylor,magnitude"],
        ):
            command = [*score, criteria, *options]
            label = " ".join(["score", criteria, *options])
            if arguments.only not in label:
                continue
            pairs(goals, label, lambda at, c=command: turn(at, c, folder / "scores.json"), old, arguments.runs)
        shutil.rmtree(model)
        if arguments.only not in "prune, large; prune, small":
            goals.end()
        hidden, mlp = 2048, 5632
        nbytes = 2 * (4 * hidden * hidden + 3 * hidden * mlp)
        blocks = max(4, round((arguments.gigabytes * 1e9 - 4 * 32000 * hidden) / nbytes))
        large = random_llama(
            folder / "large", blocks=blocks, hidden=hidden, mlp=mlp, dtype="bfloat16", shard_bytes=500_000_000
        )
        small = random_llama(folder / "small", blocks=6, hidden=64, mlp=128, vocabulary=256)
        for label, checkpoint in (("prune, large", large), ("prune, small", small)):
            command = ["prune", str(checkpoint), "--blocks", "3"]
            pairs(goals, label, lambda at, c=command: turn(at, c, folder / "pruned"), old, arguments.runs)
    goals.end()


if __name__ == "__main__":
    main()
