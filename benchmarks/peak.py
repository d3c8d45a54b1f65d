"""The block part of the forward sweep, in operations per second, against plain matrix products of the same shapes.

    python benchmarks/peak.py MODEL WINDOWS.jsonl

The products are timed between the blocks of the sweep, so that both see the same minutes of the machine; the peak is the
better of the libraries in torch, at the number of rows that suits it best. Beside it the machine's memory bandwidth, and how
long moving what the sweep must move (streams in and out of every block, weights once) takes at it. Prints JSON.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from shortstack.benchmark.timing import best_seconds
from shortstack.engine import streamed
from shortstack.engine.block_model import Skeleton
from shortstack.engine.cpu import computing
from shortstack.engine.forward import block_evaluations
from shortstack.engine.interface import ForwardRequest, Windows
from shortstack.engine.streamed import StreamedModel
from shortstack.families.open_model import open_checkpoint

CPU = torch.device("cpu")


class Peak:
    """Rounds of plain products at the shapes of a block's matrices."""

    def __init__(self, shapes: list[tuple[int, int]], rows: tuple[int, ...]) -> None:
        self.pairs = {
            count: [(torch.randn(count, inner), torch.randn(outer, inner)) for outer, inner in shapes] for count in rows
        }
        self.per_row = sum(2 * outer * inner for outer, inner in shapes)
        self.rates: dict[tuple[str, int], list[float]] = {}

    def measure(self) -> None:
        """One round with each library and number of rows."""
        products = {
            "torch": lambda x, w: torch.mm(x, w.t()),  # not `linear`, which the sweep's library would take over
            "onednn": lambda x, w: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""),
        }
        for name, product in products.items():
            for rows, pairs in self.pairs.items():
                started = time.perf_counter()
                for x, w in pairs:
                    product(x, w)
                rate = rows * self.per_row / (time.perf_counter() - started)
                self.rates.setdefault((name, rows), []).append(rate)

    def best(self) -> float:
        """Operations per second of the best way, its median over all rounds."""
        return max(statistics.median(rates) for rates in self.rates.values())


def memory_bandwidth() -> float:
    """Bytes per second that a copy reads and writes, the best of a few."""
    source = torch.ones(1 << 26)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(best_seconds([lambda: target.copy_(source)], rounds=6))


@torch.no_grad()
def main(model_name: str, windows_name: str) -> None:
    checkpoint = open_checkpoint(Path(model_name))
    windows = Windows.of([json.loads(line)["input_ids"] for line in Path(windows_name).read_text().splitlines()])
    skeleton = Skeleton(checkpoint, dtype=torch.float32, device=CPU)
    shapes = [tensor.shape for tensor in checkpoint.blocks[0] if len(tensor.shape) == 2]
    peak = Peak(shapes, (640, 1280))
    spent = 0.0
    through = streamed.through_block

    def timed(*arguments: object) -> None:
        nonlocal spent
        started = time.perf_counter()
        through(*arguments)
        spent += time.perf_counter() - started

    streamed.through_block = timed
    with (
        contextlib.closing(StreamedModel(skeleton, resident=True)) as engine,
        computing(torch.float32, CPU) as library,
    ):
        engine.forward(windows, ForwardRequest(branches=True, on_progress=lambda _: peak.measure()))
    evaluations, bandwidth = block_evaluations(checkpoint.depth), memory_bandwidth()
    achieved = evaluations * windows.ids_WT.numel() * peak.per_row / spent
    hidden = checkpoint.tensors[checkpoint.anatomy.embedding].shape[1]
    moved = 2 * evaluations * windows.ids_WT.numel() * hidden * 4 + checkpoint.nbytes
    figures = {"value": achieved / peak.best(), "GFLOPs": achieved / 1e9, "peak_GFLOPs": peak.best() / 1e9}
    figures |= {"block_seconds": spent, "memory_GBps": bandwidth / 1e9, "moving_seconds": moved / bandwidth}
    print(json.dumps({**figures, "linear": library, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
