"""Scoring side by side with the published procedure: time, peak memory, and the share of the machine's own peak.

    python benchmarks/scoring.py [--blocks 16] [--runs 2]

Every figure is measured in this run, on fresh checkpoints of random float32 weights (hidden 768, MLP 2048, vocabulary
32000, 10 windows of 128). Commands run as processes, taking turns; nothing is cached between them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from common import Ran, random_llama, random_windows, run, say, shortstack

if TYPE_CHECKING:
    import torch

HIDDEN, MLP, VOCABULARY, WINDOWS, LENGTH = 768, 2048, 32000, 10, 128
MB = 1e6


def score(model: Path, windows: Path, out: Path, criteria: str, memory: str = "auto") -> Ran:
    arguments = ["score", str(model), "--data", str(windows), "--criterion", criteria, "--out", str(out)]
    return run(shortstack(*arguments, "--memory", memory, "--quiet"))


def against_published(model: Path, windows: Path, runs: int, folder: Path) -> None:
    """Whole processes, taking turns: ours, the published procedure, ours, ..."""
    ours, theirs = [], []
    for _ in range(runs):
        ours.append(score(model, windows, folder / "ppl.json", "ppl"))
        theirs.append(
            run([sys.executable, str(Path(__file__).with_name("published_ppl.py")), str(model), str(windows)])
        )
    found = json.loads((folder / "ppl.json").read_text())["criteria"]["ppl"]["scores"]
    expected = json.loads(theirs[0].output)
    worst = max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))
    a, b = statistics.median(r.seconds for r in ours), statistics.median(r.seconds for r in theirs)
    say("ppl against the published procedure", seconds=a, published_seconds=b, ratio=b / a, largest_difference=worst)
    if worst > 1e-5:
        sys.exit("the perplexities differ")


def criteria_together(model: Path, windows: Path, runs: int, folder: Path) -> None:
    alone, together = [], []
    for _ in range(runs):
        alone.append(score(model, windows, folder / "a.json", "ppl").seconds)
        together.append(score(model, windows, folder / "b.json", "ppl,taylor,magnitude").seconds)
    a, b = statistics.median(alone), statistics.median(together)
    say("ppl, taylor and magnitude together against ppl alone", seconds=b, ppl_seconds=a, ratio=b / a)


def memory(blocks: int, windows: Path, folder: Path) -> None:
    """Peak memory of a streamed run, above a process that only imports torch and transformers."""
    model = random_llama(folder / f"memory-{blocks}", blocks=blocks)
    bare = run([sys.executable, "-c", "import torch, transformers"]).peak_bytes
    peak = score(model, windows, folder / "m.json", "ppl", "streamed").peak_bytes
    block = 4 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * MLP + 2 * HIDDEN)
    outside = 4 * (2 * VOCABULARY * HIDDEN + HIDDEN)
    streams = 4 * (blocks + 1) * WINDOWS * LENGTH * HIDDEN
    allowed = outside + 3 * block + streams + 200 * MB
    say(
        f"peak memory, {blocks} blocks, streamed",
        above_bare_MB=(peak - bare) / MB,
        allowed_MB=allowed / MB,
        ratio=(peak - bare) / allowed,
        beyond_weights_and_streams_MB=(peak - bare - outside - 3 * block - streams) / MB,
        model_MB=(outside + blocks * block) / MB,
    )
    shutil.rmtree(model)


def peak(pairs: list[tuple[torch.Tensor, torch.Tensor]], operations: int) -> float:
    """Operations per second of plain matrix products: the best library, the best of three rounds."""
    import torch

    best = 0.0
    for product in (torch.nn.functional.linear, torch.ops.mkldnn._linear_pointwise):
        extra = () if product is torch.nn.functional.linear else (None, "none", [], "")
        for _ in range(3):
            started = time.perf_counter()
            for _ in range(5):
                for x, w in pairs:
                    product(x, w, *extra)
            best = max(best, 5 * operations / (time.perf_counter() - started))
    return best


def share_of_peak(model: Path, windows: Path) -> None:
    """The block part of the sweep, in operations per second, against plain matrix products of the same shapes."""
    import torch

    from shortstack.checkpoint.reader import open_checkpoint
    from shortstack.engine import sweep
    from shortstack.engine.linear import fast_linear
    from shortstack.engine.skeleton import TOKENS_AT_A_TIME, Skeleton
    from shortstack.engine.weights import BlockWeights

    tokens = TOKENS_AT_A_TIME["cpu"]
    shapes = [(HIDDEN, HIDDEN)] * 4 + [(MLP, HIDDEN)] * 2 + [(HIDDEN, MLP)]
    pairs = [(torch.randn(tokens, inner), torch.randn(outer, inner)) for outer, inner in shapes]
    per_pass = sum(2 * tokens * outer * inner for outer, inner in shapes)

    checkpoint = open_checkpoint(model)
    device = torch.device("cpu")
    ids = sweep.windows_tensor([json.loads(line)["input_ids"] for line in windows.open()], device)
    skeleton = Skeleton(checkpoint, dtype=torch.float32, device=device)
    spent = 0.0

    def timed(block: torch.nn.Module, hidden: torch.Tensor, call: object) -> torch.Tensor:
        nonlocal spent
        started = time.perf_counter()
        result = Skeleton.run_block(skeleton, block, hidden, call)
        spent += time.perf_counter() - started
        return result

    skeleton.run_block = timed
    before = peak(pairs, per_pass)
    with (
        BlockWeights(skeleton, resident=False) as weights,
        fast_linear(torch.float32, device, (MLP, HIDDEN)) as library,
    ):
        sweep.forward_sweep(skeleton, weights, ids, branches=True)
    after = peak(pairs, per_pass)
    evaluations = sweep.block_evaluations(checkpoint.depth)
    achieved = evaluations * per_pass * (WINDOWS * LENGTH / tokens) / spent
    best = max(before, after)
    say(
        "block part of the sweep against the matrix-multiply peak",
        block_seconds=spent,
        GFLOPs=achieved / 1e9,
        peak_GFLOPs=best / 1e9,
        ratio=achieved / best,
        linear=library,
        threads=torch.get_num_threads(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--runs", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        windows = random_windows(folder / "windows.jsonl")
        model = random_llama(folder / "model", blocks=arguments.blocks)
        against_published(model, windows, arguments.runs, folder)
        criteria_together(model, windows, arguments.runs, folder)
        share_of_peak(model, windows)
        shutil.rmtree(model)
        for blocks in (16, 32):
            memory(blocks, windows, folder)


if __name__ == "__main__":
    main()
