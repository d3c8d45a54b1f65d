"""Scoring on a GPU: seconds, tokens/s, share of the matrix-multiply peak, memory; beside the naive and published ways.

    python benchmarks/gpu_scoring.py [--small] [--folder DIR]

A 7B-shaped Llama of random bfloat16 weights (14 GB, deleted afterwards). `--small` is a tiny one on whatever there is, to try
the script out; its goals mean nothing there and are not applied. The other ways are timed for three blocks and extrapolated.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common import Goals, random_llama, random_windows, say
from shortstack.checkpoint.reader import Checkpoint
from shortstack.data.calibration import CalibrationSet
from shortstack.engine.forward import block_evaluations
from shortstack.engine.interface import Engine, ForwardRequest, Windows
from shortstack.engine.select import EngineOptions, choose_engine
from shortstack.families.open_model import open_checkpoint
from shortstack.retraining.placement import matmul_flops
from shortstack.scoring.criteria import parse_criteria
from shortstack.scoring.score import score_windows

SEVEN = {"blocks": 32, "hidden": 4096, "mlp": 11008, "vocabulary": 32000}
SMALL = {"blocks": 4, "hidden": 256, "mlp": 704, "vocabulary": 1000}
TRIED = 3  # candidates of the slow ways


class Bench:
    """One checkpoint on one device."""

    def __init__(self, model: Path, shape: dict[str, int], folder: Path) -> None:
        self.model, self.shape, self.folder = model, shape, folder
        self.checkpoint: Checkpoint = open_checkpoint(model)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.block = 4 * shape["hidden"] ** 2 + 3 * shape["hidden"] * shape["mlp"]
        self.peak = matmul_flops(self.device, torch.bfloat16)

    def timed(self, work: Callable[[], Any]) -> tuple[float, Any]:
        self.wait()
        started = time.perf_counter()
        result = work()
        self.wait()
        return time.perf_counter() - started, result

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak_gb(self) -> float:
        if self.device.type != "cuda":
            return 0.0
        held = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
        return held

    def sweep(self, engine: Engine, windows: Windows) -> float:
        """Seconds of one forward sweep with all candidates."""
        return self.timed(lambda: engine.forward(windows, ForwardRequest(branches=True)))[0]

    def windows(self, count: int, length: int) -> list[list[int]]:
        path = random_windows(
            self.folder / f"{count}x{length}.jsonl", count=count, length=length, vocabulary=self.shape["vocabulary"]
        )
        return [json.loads(line)["input_ids"] for line in path.read_text().splitlines()]

    def operations(self, tokens: int) -> float:
        heads = (self.shape["blocks"] + 1) * self.shape["vocabulary"] * self.shape["hidden"]
        return 2.0 * tokens * (block_evaluations(self.shape["blocks"]) * self.block + heads)


def read_seconds(model: Path) -> float:
    """Reading the files once more, from the page cache."""
    started = time.perf_counter()
    buffer = bytearray(64 << 20)
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - started


def ours(bench: Bench, count: int, length: int) -> dict[str, float]:
    """ppl: the first sweep brings the weights in, the second finds them there."""
    windows = bench.windows(count, length)
    options = EngineOptions(torch.bfloat16, bench.device, "resident")
    engine = choose_engine(bench.checkpoint, windows, options)
    swept = Windows.of(windows, bench.device)
    bench.peak_gb()

    first, again = bench.sweep(engine, swept), bench.sweep(engine, swept)
    engine.close()
    tokens = swept.ids_WT.numel()
    needed = bench.operations(tokens)
    figures = {"first_seconds": first, "resident_seconds": again, "share_of_peak": needed / again / bench.peak}
    figures |= {"tokens_per_second": tokens * len(engine.blocks) / again, "peak_GB": bench.peak_gb()}
    say(f"ppl, {count} x {length}", **figures, peak_TFLOPs=bench.peak / 1e12, device=name_of(bench.device))
    return figures


def streamed(bench: Bench, windows: list[list[int]]) -> float:
    """Seconds of a sweep that keeps no block, and peak memory."""
    engine = choose_engine(bench.checkpoint, windows, EngineOptions(torch.bfloat16, bench.device, "streamed"))
    bench.peak_gb()
    seconds = bench.sweep(engine, Windows.of(windows, bench.device))
    engine.close()
    say(f"ppl, {len(windows)} x {len(windows[0])}, streamed", seconds=seconds, peak_GB=bench.peak_gb())
    return seconds


def everything(bench: Bench, count: int, length: int) -> None:
    windows = CalibrationSet(bench.windows(count, length), {})
    bench.peak_gb()
    seconds, found = bench.timed(
        lambda: score_windows(bench.checkpoint, windows, parse_criteria("ppl,taylor,magnitude"), device=str(bench.device),
                              dtype="bfloat16")
    )  # fmt: skip
    say(f"ppl, taylor, magnitude, {count} x {length}, weights read", seconds=seconds, memory=found.settings["memory"],
        peak_GB=bench.peak_gb())  # fmt: skip


@torch.no_grad()
def naive(bench: Bench, windows: list[list[int]], at_once: int) -> float:
    """Seconds for all candidates: the loaded model with a block bypassed, windows in batches as large as fit."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(bench.model, dtype=torch.bfloat16).to(bench.device).eval()
    ids, blocks = torch.tensor(windows, device=bench.device), model.model.layers

    def candidate(removed: int) -> None:
        model.model.layers = torch.nn.ModuleList([block for i, block in enumerate(blocks) if i != removed])
        for part in ids.split(at_once):
            logits = model(part, use_cache=False).logits[:, :-1].float()
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten())

    candidate(0)
    seconds, _ = bench.timed(lambda: [candidate(removed) for removed in range(TRIED)])
    return seconds / TRIED * len(blocks)


@torch.no_grad()
def published(bench: Bench, windows: list[list[int]]) -> float:
    """Seconds for all candidates: a random model, a copy of the weights, onto the device, window after window."""
    from transformers import AutoModelForCausalLM

    dense = AutoModelForCausalLM.from_pretrained(bench.model, dtype=torch.bfloat16)
    weights = dense.state_dict()
    config = copy.deepcopy(dense.config)
    config.num_hidden_layers -= 1
    ids = torch.tensor(windows, device=bench.device)

    def candidate() -> None:
        pruned = AutoModelForCausalLM.from_config(config)
        pruned.load_state_dict({name: weights[name] for name in pruned.state_dict()})
        pruned = pruned.to(bench.device, torch.bfloat16).eval()
        for window in ids:
            logits = pruned(window[None]).logits[:, :-1].float()
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), window[1:])

    # Making it takes most of a minute on a host of 16 cores: one stands for all.
    seconds, _ = bench.timed(candidate)
    return seconds * dense.config.num_hidden_layers


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else "cpu"


def let_go() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--folder", type=Path, help="for the checkpoint (14 GB)")
    arguments = parser.parse_args()
    shape, length, many = (SMALL, 64, 4) if arguments.small else (SEVEN, 2048, 64)
    goals = Goals()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        model = random_llama(Path(name) / "m", dtype="bfloat16", shard_bytes=2 << 30, same_blocks=True, **shape)
        os.sync()
        bench = Bench(model, shape, Path(name))
        few = bench.windows(10, 128)
        read_seconds(model)
        read = read_seconds(model)
        short = ours(bench, 10, 128)
        let_go()
        stream = streamed(bench, few)
        let_go()
        everything(bench, 10, 128)
        let_go()
        long = ours(bench, many, length)
        let_go()
        goals.figure("10 x 128, resident: seconds", short["resident_seconds"], at_most=1.2)
        goals.figure("10 x 128, streamed from the page cache: times the reading", stream / read, at_most=1.3,
                     read_seconds=read)  # fmt: skip
        goals.figure(f"{many} x {length}: share of the matrix-multiply peak", long["share_of_peak"], at_least=0.65)
        slow = naive(bench, few, len(few))
        let_go()
        say(
            "10 x 128: times as fast as the naive procedure", ratio=slow / short["resident_seconds"], naive_seconds=slow
        )
        slow = naive(bench, bench.windows(many, length)[:4], 4) * many / 4
        let_go()
        say(
            f"{many} x {length}: times as fast as the naive procedure",
            ratio=slow / long["resident_seconds"],
            naive_seconds=slow,
        )
        slow = published(bench, few)
        goals.figure("10 x 128: times as fast as the published procedure", slow / short["resident_seconds"], at_least=100,
                     published_seconds=slow)  # fmt: skip
    if arguments.small:
        sys.exit(0)
    goals.end()


if __name__ == "__main__":
    main()
