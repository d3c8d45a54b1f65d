"""Scoring a 7B-shaped checkpoint block by block: peak memory, and whether reading hides behind computing.

    python benchmarks/streaming.py [--folder DIR] [--windows 2] [--small]

A Llama of 32 blocks, hidden 4096, MLP 11008, vocabulary 32000 (6.7 billion parameters, 13.5 GB in bfloat16), written shard by
shard and deleted afterwards. Its blocks hold the same random weights: what is computed takes as long. Files are dropped
from the page cache before each reading. `--small` is a tenth of it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from common import Goals, random_llama, random_windows, run, say, shortstack

if TYPE_CHECKING:
    from shortstack.checkpoint.reader import Checkpoint
    from shortstack.engine.block_weights import BlockWeights
    from shortstack.engine.interface import Windows
    from shortstack.engine.streamed import StreamedModel

GB = 1e9
MEMORY_GOAL, OVERLAP_GOAL = 4.0, 1.15


def forget(model: Path) -> None:
    """Out of the page cache: the next reading is from the disk."""
    for file in model.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)  # what is not yet written cannot be dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def memory(goals: Goals, model: Path, windows: Path, folder: Path) -> None:
    """The command as a process: its peak above one that only imports torch and transformers."""
    bare = run([sys.executable, "-c", "import torch, transformers"]).peak_bytes
    forget(model)
    out = folder / "scores.json"
    count = len(windows.read_text().splitlines())
    command = ["score", str(model), "--data", str(windows), "--samples", str(count), "--memory", "streamed"]
    ran = run(shortstack(*command, "--out", str(out), "--quiet"))
    settings = json.loads(out.read_text())["settings"]
    above = (ran.peak_bytes - bare) / GB
    goals.figure("7B-shaped, ppl, streamed, whole process: GB above a bare process", above, at_most=MEMORY_GOAL,
                 seconds=ran.seconds, dtype=settings["dtype"], windows=count)  # fmt: skip


def overlap(
    model: Path, windows: Path, dtype_name: str, candidates: list[int] | None
) -> tuple[float, dict[str, object]]:
    """One sweep: reading alone, computing alone (on weights that are there), and both together."""
    import torch

    from shortstack.engine.block_model import Skeleton
    from shortstack.engine.interface import Windows
    from shortstack.engine.streamed import StreamedModel
    from shortstack.families.open_model import open_checkpoint

    checkpoint = open_checkpoint(model)
    device, dtype = torch.device("cpu"), getattr(torch, dtype_name)
    given = Windows.of([json.loads(line)["input_ids"] for line in windows.open()])
    skeleton = Skeleton(checkpoint, dtype=dtype, device=device)
    # As the command reads them: past the page cache where it would not hold them.
    with contextlib.closing(StreamedModel(skeleton, resident=False, candidates=candidates)) as engine:
        weights = engine.weights
        forget(model)
        disk_rate = checkpoint.nbytes / disk_alone(model)
        forget(model)
        read = read_alone(weights, checkpoint)
        forget(model)
        together = swept(engine, given)
        compute = compute_alone(engine, given)
    more = {"read_seconds": read, "compute_seconds": compute, "together_seconds": together, "dtype": dtype_name}
    blocks = sum(tensor.nbytes for block in checkpoint.blocks for tensor in block)
    more |= {"disk_GBps": disk_rate / GB, "read_GBps": blocks / read / GB}
    more |= {"tokens": given.ids_WT.numel(), "candidates": "all" if candidates is None else len(candidates)}
    return together / max(compute, read), more


def disk_alone(model: Path) -> float:
    """The files from first byte to last, into one small piece of memory: the disk's own rate."""
    piece = bytearray(16 << 20)
    started = time.perf_counter()
    for file in sorted(model.glob("*.safetensors")):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(piece):
                pass
    return time.perf_counter() - started


def swept(engine: StreamedModel, windows: Windows) -> float:
    from shortstack.engine.interface import ForwardRequest

    started = time.perf_counter()
    engine.forward(windows, ForwardRequest(branches=True))
    return time.perf_counter() - started


def read_alone(weights: BlockWeights, checkpoint: Checkpoint) -> float:
    from shortstack.engine.storage import Buffer

    buffers = [Buffer(max(weights._files.buffer_bytes(block) for block in weights._stored)) for _ in range(2)]
    started = time.perf_counter()
    for index in range(checkpoint.depth):
        weights._read(index, buffers, index % 2)
    return time.perf_counter() - started


def compute_alone(engine: StreamedModel, windows: Windows) -> float:
    """The same sweep, where every block's weights are those of one of the first four, which are in memory.

    One block's might stay in a large cache.
    """
    from shortstack.engine.block_weights import Arrived
    from shortstack.engine.storage import Buffer

    weights = engine.weights
    stored, within = weights._stored, weights._checkpoint.anatomy.within_block
    first = [weights._read(index, [Buffer(weights._files.buffer_bytes(stored[index]))], 0) for index in range(4)]
    by_name = [{within(name): value for name, value in arrived.tensors.items()} for arrived in first]
    real = weights._read
    weights._read = lambda index, *_: Arrived(
        {tensor.name: by_name[index % 4][within(tensor.name)] for tensor in stored[index]}
    )
    try:
        return swept(engine, windows)
    finally:
        weights._read = real


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, help="where the checkpoint is written (14 GB); a temporary one by default"
    )
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="hidden size 1024, to try this out")
    arguments = parser.parse_args()
    size = {"hidden": 1024, "mlp": 2816} if arguments.small else {"hidden": 4096, "mlp": 11008}
    goals = Goals()
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        model = random_llama(
            folder / "model", blocks=32, **size, dtype="bfloat16", shard_bytes=2 << 30, same_blocks=True
        )
        few = random_windows(folder / "few.jsonl", count=arguments.windows)
        balanced = random_windows(folder / "balanced.jsonl", count=4)
        memory(goals, model, few, folder)
        ratio, more = overlap(model, few, "bfloat16", None)
        goals.figure(
            "7B-shaped, ppl: time with reading over the longer of reading and computing",
            ratio,
            at_most=OVERLAP_GOAL,
            **more,
        )
        ratio, more = overlap(model, balanced, "bfloat16", [31])
        say("7B-shaped, one candidate: reading and computing in balance", ratio=ratio, **more)
    finally:
        shutil.rmtree(folder)
    goals.end()


if __name__ == "__main__":
    main()
