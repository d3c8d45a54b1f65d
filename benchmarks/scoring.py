"""Scoring side by side with the published procedure, with the naive procedure, and with the peak of the machine.

    python benchmarks/scoring.py [--all] [--runs 3]

One JSON line per figure, with its goal beside it where there is one; exit code 1 where one falls short. Every figure is
measured in this run, on fresh checkpoints of random float32 weights (vocabulary 32000, 10 windows of 128), with commands as
processes that take turns. Without `--all`: 16 blocks of width 768 alone, some minutes. With it also 24 x 1024, more windows,
bfloat16, and a 7B-shaped checkpoint (14 GB of disk): three quarters of an hour.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import Goals, Ran, random_llama, random_windows, run, say, shortstack
from shortstack.scoring.agreement import kendall_tau

HERE = Path(__file__).parent
SHARED = HERE.resolve().parents[1] / "shared" / "data" / "models"
SIZES = {"16 x 768": (16, 768, 2048), "24 x 1024": (24, 1024, 2816)}
VOCABULARY, WINDOWS, LENGTH = 32000, 10, 128
MB = 1e6


def score(model: Path | str, windows: Path, out: Path, criteria: str, *options: str) -> tuple[Ran, dict]:
    arguments = ["score", str(model), "--data", str(windows), "--criterion", criteria, "--out", str(out), *options]
    ran = run(shortstack(*arguments, "--quiet"))
    return ran, json.loads(out.read_text())


def script(name: str, model: Path, windows: Path) -> tuple[Ran, dict]:
    ran = run([sys.executable, str(HERE / name), str(model), str(windows)])
    return ran, json.loads(ran.output)


def middle(values: list[float]) -> float:
    return statistics.median(values)


def ppl(goals: Goals, size: str, model: Path, windows: Path, runs: int, folder: Path, peak: float) -> None:
    """Whole processes, taking turns: ours, the naive procedure, the published procedure, ours, ...

    The published procedure takes minutes at 24 x 1024: one run of it there, and `runs` of the others.
    `possible` is what the ratio would be if all that ours did after imports were matrix products at the machine's peak.
    """
    blocks, hidden, mlp = SIZES[size]
    whole: dict[str, list[float]] = {"ours": [], "published": [], "naive": []}
    after: dict[str, list[float]] = {"ours": [], "published": [], "naive": []}
    scores = {}
    for turn in range(runs):
        ran, found = score(model, windows, folder / "ppl.json", "ppl")
        scores["ours"] = found["criteria"]["ppl"]["scores"]
        whole["ours"].append(ran.seconds)
        after["ours"].append(found["seconds"])
        for name in ("naive", "published") if turn == 0 or blocks == 16 else ("naive",):
            ran, said = script(f"{name}_ppl.py", model, windows)
            scores[name] = said["scores"]
            whole[name].append(ran.seconds)
            after[name].append(said["seconds"])
    for name in ("published", "naive"):
        worst = max(abs(a / b - 1) for a, b in zip(scores["ours"], scores[name], strict=True))
        goals.figure(f"{size}: ppl scores, largest relative difference to the {name} procedure", worst, at_most=1e-5)
    block, head = 4 * hidden * hidden + 3 * hidden * mlp, VOCABULARY * hidden
    ours = blocks * (blocks + 1) / 2 * block + (blocks + 1) * head
    operations = (blocks * (blocks - 1) * block + blocks * head) / ours
    floor = 2 * WINDOWS * LENGTH * ours / peak
    start_up = middle(whole["ours"]) - middle(after["ours"])
    seconds = {f"{name}_seconds": middle(values) for name, values in whole.items()}
    later = {f"{name}_seconds": middle(values) for name, values in after.items()}
    ratio = {name: middle(whole[name]) / middle(whole["ours"]) for name in whole}
    ratio_after = {name: middle(after[name]) / middle(after["ours"]) for name in after}
    goals.figure(f"{size}: times as fast as the published procedure, whole processes", ratio["published"], at_least=3.2,
                 ratio_of_operations=operations, possible=middle(whole["published"]) / (floor + start_up),
                 **seconds)  # fmt: skip
    goals.figure(f"{size}: times as fast as the published procedure, after imports", ratio_after["published"], at_least=3.6,
                 possible=middle(after["published"]) / floor, ratio_of_operations=operations, **later)  # fmt: skip
    goals.figure(f"{size}: times as fast as the naive procedure, after imports", ratio_after["naive"], at_least=1.7,
                 ratio_of_operations=operations, whole_processes=ratio["naive"])  # fmt: skip


def criteria_together(goals: Goals, model: Path, windows: Path, runs: int, folder: Path) -> None:
    alone, together = [], []
    for _ in range(runs):
        alone.append(score(model, windows, folder / "a.json", "ppl")[0].seconds)
        together.append(score(model, windows, folder / "b.json", "ppl,taylor,magnitude")[0].seconds)
    goals.figure("ppl, taylor and magnitude together, times ppl alone", middle(together) / middle(alone), at_most=1.6,
                 seconds=middle(together), ppl_seconds=middle(alone))  # fmt: skip


def taylor(goals: Goals, size: str, model: Path, windows: Path, runs: int, folder: Path) -> None:
    ways = {"streamed": 1.35, "resident": 1.1}
    seconds: dict[str, list[float]] = {"streamed": [], "resident": [], "naive": []}
    peaks = {}
    for _ in range(runs):
        for way in ways:
            ran, found = score(model, windows, folder / "t.json", "taylor", "--memory", way)
            seconds[way].append(found["seconds"])
            peaks[way] = ran.peak_bytes / MB
        ran, said = script("naive_taylor.py", model, windows)
        seconds["naive"].append(said["seconds"])
        peaks["naive"] = ran.peak_bytes / MB
    worst = max(abs(a / b - 1) for a, b in zip(found["criteria"]["taylor"]["scores"], said["scores"], strict=True))
    goals.figure(f"{size}: taylor scores, largest relative difference to the whole model's", worst, at_most=1e-4)
    for way, most in ways.items():
        goals.figure(f"{size}: taylor {way}, times the whole model's backward, after imports",
                     middle(seconds[way]) / middle(seconds["naive"]), at_most=most, seconds=middle(seconds[way]),
                     naive_seconds=middle(seconds["naive"]), peak_MB=peaks[way], naive_peak_MB=peaks["naive"])  # fmt: skip


def memory(goals: Goals, blocks: int, windows: Path, folder: Path) -> None:
    """Peak memory of a streamed run, above a process that only imports torch and transformers."""
    _, hidden, mlp = SIZES["16 x 768"]
    model = random_llama(folder / f"memory-{blocks}", blocks=blocks)
    bare = run([sys.executable, "-c", "import torch, transformers"]).peak_bytes
    peak = score(model, windows, folder / "m.json", "ppl", "--memory", "streamed")[0].peak_bytes
    block = 4 * (4 * hidden * hidden + 3 * hidden * mlp + 2 * hidden)
    outside = 4 * (2 * VOCABULARY * hidden + hidden)
    streams = 4 * (blocks + 1) * WINDOWS * LENGTH * hidden
    allowed = outside + 3 * block + streams + 200 * MB
    limit = "weights outside blocks, 3 blocks, streams, 200 MB"
    goals.figure(f"peak memory, {blocks} blocks, streamed: share of the limit ({limit})",
                 (peak - bare) / allowed, at_most=1.0, above_bare_MB=(peak - bare) / MB, allowed_MB=allowed / MB,
                 model_MB=(outside + blocks * block) / MB)  # fmt: skip
    shutil.rmtree(model)


def more_windows(goals: Goals, folder: Path) -> None:
    """From 10 to 500 windows: the cost of one, and what a memory limit does."""
    blocks, hidden, limit = 8, 256, 200
    model = random_llama(folder / "windows", blocks=blocks, hidden=hidden, mlp=704, vocabulary=4000)
    rows = random_windows(folder / "many.jsonl", count=500, vocabulary=4000)
    seconds, peaks = {}, {}
    for count, options in ((10, ()), (100, ()), (500, ()), (500, ("--memory-limit", f"{limit}MB"))):
        ran, found = score(model, rows, folder / "w.json", "ppl", "--samples", str(count), *options)
        seconds[count, options] = found["seconds"] / count
        peaks[count, options] = ran.peak_bytes / MB
    limited = (500, ("--memory-limit", f"{limit}MB"))
    goals.figure("seconds a window, 500 windows against 100", seconds[500, ()] / seconds[100, ()], at_most=1.1,
                 ten=seconds[10, ()], hundred=seconds[100, ()], five_hundred=seconds[500, ()])  # fmt: skip
    streams = (blocks + 1) * 500 * LENGTH * hidden * 4 / MB
    goals.figure(f"500 windows with --memory-limit {limit}MB: MB above 10 windows", peaks[limited] - peaks[10, ()],
                 at_most=1.1 * limit, without_limit=peaks[500, ()] - peaks[10, ()], all_streams_MB=streams,
                 times_as_long=seconds[limited] / seconds[500, ()])  # fmt: skip
    shutil.rmtree(model)


def precision(goals: Goals, windows: Path, folder: Path) -> None:
    """bfloat16: how fast, what `auto` makes of it, and whether the orders are those of float32."""
    model = random_llama(folder / "bf16", blocks=16, dtype="bfloat16")
    exact = score(model, windows, folder / "f32.json", "ppl", "--dtype", "float32")[1]
    half = score(model, windows, folder / "bf16.json", "ppl", "--dtype", "bfloat16")[1]
    chosen = score(model, windows, folder / "auto.json", "ppl")[1]["settings"]["dtype"]
    ratio = exact["seconds"] / half["seconds"]
    right = chosen == ("bfloat16" if ratio >= 1.3 else "float32")
    say("16 x 768: bfloat16 against float32, after imports", ratio=ratio, auto_chose=chosen)
    goals.figure("--dtype auto is the faster one", float(right), at_least=1.0)
    shutil.rmtree(model)
    for name in ("embedded", *sorted(str(path) for path in SHARED.glob("*") if (path / "config.json").is_file())):
        for dtype in ("float32", "bfloat16"):
            command = ["score", name, "--criterion", "ppl,taylor,magnitude", "--dtype", dtype, "--quiet"]
            run(shortstack(*command, "--out", str(folder / f"{dtype}.json")))
        orders = [json.loads((folder / f"{dtype}.json").read_text())["criteria"] for dtype in ("float32", "bfloat16")]
        taus = {criterion: kendall_tau(*(order[criterion]["order"] for order in orders)) for criterion in orders[0]}
        say(f"{Path(name).name}: Kendall's tau of the orders in bfloat16 and float32", **taus)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every figure; three quarters of an hour")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    goals = Goals()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        windows = random_windows(folder / "windows.jsonl")
        for size in SIZES if arguments.all else list(SIZES)[:1]:
            blocks, hidden, mlp = SIZES[size]
            model = random_llama(folder / "model", blocks=blocks, hidden=hidden, mlp=mlp)
            share = json.loads(run([sys.executable, str(HERE / "peak.py"), str(model), str(windows)]).output)
            goals.figure(f"{size}: block part of the sweep, share of the matrix-multiply peak", **share, at_least=0.8)
            ppl(goals, size, model, windows, arguments.runs, folder, share["peak_GFLOPs"] * 1e9)
            taylor(goals, size, model, windows, arguments.runs + 1 if blocks == 16 else 2, folder)
            if blocks == 16:
                criteria_together(goals, model, windows, arguments.runs, folder)
            shutil.rmtree(model)
        for blocks in (16, 32):
            memory(goals, blocks, windows, folder)
        if arguments.all:
            more_windows(goals, folder)
            precision(goals, windows, folder)
    if arguments.all and subprocess.run([sys.executable, str(HERE / "streaming.py"), "--windows", "1"]).returncode:
        goals.short.append("a 7B-shaped checkpoint, streamed: above")
    goals.end()


if __name__ == "__main__":
    main()
