"""What `--dtype auto` computes a long run in on a CPU, by measuring: bfloat16 is slower on some, twice as fast on others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from shortstack.checkpoint.reader import Checkpoint
from shortstack.engine.cpu import best_seconds, fast_linear, largest_matrix
from shortstack.runtime.devices import DType, pick_dtype

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
            in float32, and float16 where it is float16. On a CPU it is float32, or bfloat16 where the checkpoint is stored
            in it, the run is long, and it measures at least 1.3 times as fast.
        operations: of the whole run, about.
        say: is given a line with what was measured and chosen.
    """
    stored = checkpoint.tensors[checkpoint.anatomy.embedding].dtype
    asked = name
    if name == "auto" and device.type == "cpu" and stored == "BF16" and operations >= _LONG_RUN:
        ratio = bfloat16_speed(*largest_matrix(checkpoint))
        name = "bfloat16" if ratio >= WORTH_IT else "float32"
        say(
            f"--dtype auto: {name}; bfloat16, which the checkpoint is stored in, is {ratio:.2g} times as fast as float32 here"
        )
    elif name == "auto" and device.type == "cuda" and stored != "F16":
        name = "bfloat16"
    computed = pick_dtype(name, stored, device)
    if asked == "auto" and computed.itemsize < {"F32": 4, "F64": 8}.get(stored, 0):
        say(f"--dtype auto: {str(computed).removeprefix('torch.')} on {device}; the checkpoint is stored in {stored}")
    return computed


@torch.no_grad()
def bfloat16_speed(outputs: int, inputs: int) -> float:
    """How many times as fast bfloat16 is, for a feed-forward layer of this shape on some tokens: the best of what half a
    second allows, taking turns."""
    cpu = torch.device("cpu")
    outputs, inputs = min(outputs, 4096), min(inputs, 4096)  # larger ones say the same and take seconds

    def layer(dtype: torch.dtype) -> Callable[[], torch.Tensor]:
        shapes = ((_TOKENS, inputs), (outputs, inputs), (inputs, outputs))
        x, up, down = (torch.ones(shape, dtype=dtype) for shape in shapes)

        def run() -> torch.Tensor:
            wide = functional.linear(x, up)
            return functional.linear(functional.silu(wide) * wide, down) + x

        return run

    with fast_linear(torch.float32, cpu, (outputs, inputs)):  # bfloat16 is passed on as it is
        calls = [layer(torch.float32), layer(torch.bfloat16)]
        exact, half = best_seconds(calls, rounds=50, budget_seconds=_BUDGET_SECONDS)
    return exact / half
