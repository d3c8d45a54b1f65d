"""What `--dtype auto` computes a long run in on a CPU, by measuring: bfloat16 is slower on some, twice as fast on others."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.nn import functional

from shortstack.checkpoint.reader import Checkpoint
from shortstack.engine.linear import fast_linear, largest_matrix
from shortstack.machine import DType, pick_dtype

WORTH_IT = 1.3  # how many times as fast bfloat16 must be
_LONG_RUN = 1e12  # operations: some seconds on a laptop; below, measuring would take longer than it can save
_BUDGET_SECONDS = 0.5
_TOKENS = 128


def chosen_dtype(
    name: DType, checkpoint: Checkpoint, device: torch.device, operations: float, *, say: Callable[[str], object]
) -> torch.dtype:
    """What a scoring run computes in.

    Args:
        name: what was asked for. `auto` on a GPU is bfloat16, which GPUs are made for, also where the checkpoint is stored
            in float32, and float16 where it is float16; on a CPU it is measured.
        operations: of the whole run, about.
        say: is given a line with what was measured.
    """
    stored = checkpoint.tensors[checkpoint.anatomy.embedding].dtype
    if name == "auto" and device.type == "cpu":
        name = measured_dtype(checkpoint, operations, say=say)
    elif name == "auto" and device.type == "cuda" and stored != "F16":
        name = "bfloat16"
    return pick_dtype(name, stored, device)


def measured_dtype(
    checkpoint: Checkpoint, operations: float, *, say: Callable[[str], object] = lambda _: None
) -> DType:
    """float32, or bfloat16 where the checkpoint is stored in it, the run is long, and it is at least 1.3 times as fast here.

    Args:
        operations: of the whole run, about.
        say: is given a line with what was chosen and why.
    """
    if checkpoint.tensors[checkpoint.anatomy.embedding].dtype != "BF16" or operations < _LONG_RUN:
        return "float32"
    ratio = bfloat16_speed(*largest_matrix(checkpoint))
    chosen: DType = "bfloat16" if ratio >= WORTH_IT else "float32"
    say(
        f"--dtype auto: {chosen}; bfloat16, which the checkpoint is stored in, is {ratio:.2g} times as fast as float32 here"
    )
    return chosen


@torch.no_grad()
def bfloat16_speed(outputs: int, inputs: int) -> float:
    """How many times as fast bfloat16 is, for a feed-forward layer of this shape on some tokens: the best of what half a
    second allows, taking turns."""
    cpu = torch.device("cpu")
    outputs, inputs = min(outputs, 4096), min(inputs, 4096)  # larger ones say the same and take seconds
    dtypes = (torch.float32, torch.bfloat16)
    layers = [tuple(torch.ones(shape, dtype=dtype) for shape in ((_TOKENS, inputs), (outputs, inputs), (inputs, outputs)))
              for dtype in dtypes]  # fmt: skip
    best = [float("inf"), float("inf")]
    started = time.perf_counter()
    rounds = 0
    while rounds < 2 or (time.perf_counter() - started < _BUDGET_SECONDS and rounds < 50):
        for which, (x, up, down) in enumerate(layers):
            with fast_linear(dtypes[which], cpu, (outputs, inputs)):
                begun = time.perf_counter()
                wide = functional.linear(x, up)
                functional.linear(functional.silu(wide) * wide, down) + x
                best[which] = min(best[which], time.perf_counter() - begun)
        rounds += 1
    return best[0] / best[1]
