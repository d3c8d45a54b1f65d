"""Evaluation against what it stands on: lm-evaluation-harness by itself, and transformers' own loop.

    python benchmarks/evaluation.py [--data ../shared/data] [--limit 200] [--runs 3]

Zero-shot as whole processes, start-up included, the same rows and metrics; perplexity in one process, taking turns, against
a loop over transformers at its best batch size; perplexities also by a script that shares nothing with shortstack. One
JSON line per figure with its goal; exit 1 if one falls short.
"""

from __future__ import annotations

import argparse
import ast
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import random_llama, run, say, shortstack
from shortstack.evaluation.zeroshot import MEAN

BATCHES = (1, 4, 16, 64, 128)
_short = []


def judged(name: str, ratio: float, goal: float, **figures: object) -> None:
    """One line; a ratio above its goal is remembered."""
    say(name, ratio=ratio, goal=goal, **figures)
    if ratio > goal:
        _short.append(name)


def zeroshot(data: Path, limit: int, folder: Path) -> None:
    """Whole processes: ours against the harness alone at each batch size."""
    model, tasks, here = data / "models/stories260k", data / "tasks", Path(__file__).parent
    options = ["--limit", str(limit), "--fresh", "--quiet", "--out", str(folder / "z.json")]
    ours = run(shortstack("eval", "zeroshot", str(model), "--tasks-dir", str(tasks), *options))
    record = json.loads((folder / "z.json").read_text())
    script = [sys.executable, "-W", "ignore", str(here / "harness_zeroshot.py"), str(model), str(tasks), str(limit)]
    alone = {batch: run([*script, str(batch)]) for batch in (1, 16, 64)}
    best = min(alone, key=lambda batch: alone[batch].seconds)
    scores = ast.literal_eval(alone[best].output.splitlines()[-1])["scores"]
    same = all(record["figures"][name]["value"] == scores[name.split()[0]] for name in record["figures"]
               if name != MEAN and name.split()[0] in scores and name.split()[1] == _metric(name))  # fmt: skip
    judged(
        "zeroshot, seven tasks, whole process", ours.seconds / alone[best].seconds, 1.05, limit=limit, ours=ours.seconds,
        harness={batch: round(found.seconds, 1) for batch, found in alone.items()}, same_scores=same,
    )  # fmt: skip
    judged("zeroshot, seconds of 240 allowed", ours.seconds / 240, 1.0, ours=ours.seconds)
    if not same:
        _short.append("zeroshot: other scores")


def _metric(name: str) -> str:
    from shortstack.evaluation.task_files import TASKS

    return TASKS[name.split()[0]].metric


def perplexity(model: str, windows: int, runs: int) -> None:
    """Our windows against a loop over transformers, each batch size of it, taking turns."""
    import torch
    from transformers import AutoModelForCausalLM

    from shortstack.evaluation.ppl import window_nll
    from shortstack.families.open_model import open_checkpoint

    checkpoint = open_checkpoint(model)
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint.directory, dtype=torch.float32).eval()
    rows = checkpoint.tensors[checkpoint.anatomy.embedding].shape[0]
    ids = torch.randint(3, rows, (windows, 128), generator=torch.Generator().manual_seed(0))

    def plain(batch: int) -> Callable[[], float]:
        def loop() -> float:
            with torch.no_grad():
                return sum(float(loaded(part, labels=part).loss) * len(part) for part in ids.split(batch)) / windows

        return loop

    def ours() -> float:
        found = window_nll(loaded, ids.tolist(), checkpoint, device=torch.device("cpu"))
        return sum(found) / windows

    ways: dict[Any, Callable[[], float]] = {"ours": ours, **{batch: plain(batch) for batch in BATCHES}}
    seconds: dict[Any, list[float]] = {way: [] for way in ways}
    values = {}
    for turn in range(runs + 1):
        for way, call in ways.items():
            started = time.perf_counter()
            values[way] = call()
            if turn:  # the first turn warms up
                seconds[way].append(time.perf_counter() - started)
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    best = min(BATCHES, key=lambda batch: medians[batch])
    judged(
        "perplexity, 128 tokens a window", medians["ours"] / medians[best], 1.0, model=Path(model).name, windows=windows,
        ours=medians["ours"], best_batch=best, transformers={str(b): round(medians[b], 3) for b in BATCHES},
        difference=abs(values["ours"] - values[best]),
    )  # fmt: skip


def independent(data: Path, folder: Path) -> None:
    """The same perplexities from a script of a few lines."""
    for name in ("stories260k", "babyllama105"):
        model, text = data / "models" / name, data / "text"
        run(shortstack(
            "eval", "ppl", str(model), "--data", "wikitext2,ptb", "--data-dir", str(text), "--seq-len", "128", "--fresh",
            "--quiet", "--out", str(folder / "p.json"),
        ))  # fmt: skip
        ours = {
            r["data"]["source"]: r["figures"]["ppl_128"]["value"] for r in json.loads((folder / "p.json").read_text())
        }
        script = str(Path(__file__).with_name("independent_ppl.py"))
        lines = run([sys.executable, "-W", "ignore", script, str(model), str(text)]).output.splitlines()
        theirs = {line["text"]: line["ppl_128"] for line in map(json.loads, lines)}
        for source, value in theirs.items():
            difference = abs(ours[source] / value - 1)
            judged(
                "perplexity, an independent script",
                difference,
                1e-5,
                model=name,
                text=source,
                ours=ours[source],
                theirs=value,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        perplexity("embedded", 256, arguments.runs)
        perplexity(str(random_llama(folder / "llama", blocks=16)), 32, arguments.runs)
        if not arguments.data.is_dir():
            sys.exit(f"{arguments.data}: not there, so nothing else can be measured")
        perplexity(str(arguments.data / "models/stories260k"), 512, arguments.runs)
        zeroshot(arguments.data, arguments.limit, folder)
        independent(arguments.data, folder)
    if _short:
        sys.exit("short of the goal: " + "; ".join(_short))


if __name__ == "__main__":
    main()
