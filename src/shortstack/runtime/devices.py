"""Devices and dtypes: where a model is computed, and in what precision."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Literal

from shortstack.common.progress import say
from shortstack.errors import ShortstackError, UsageError, did_you_mean, first_line

if TYPE_CHECKING:
    import torch

DType = Literal["auto", "float32", "bfloat16", "float16", "float64"]
_DEVICES = ("auto", "cpu", "cuda", "mps")


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the GPU of a Mac (mps), else the CPU.

    Raises:
        ShortstackError: no such device here.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        kind = name.partition(":")[0]
        if kind not in _DEVICES:
            gpu = "mps" if torch.backends.mps.is_available() else "cuda"
            hint = f"did you mean {gpu}?" if kind.lower() == "gpu" else did_you_mean(kind.lower(), _DEVICES)
            raise UsageError(f"--device {name}: unknown", hint=hint) from None
        raise ShortstackError(f"--device {name}: not usable here ({first_line(error)})", hint="--device cpu") from None
    if device.type == "mps":
        _say_unmeasured()
    return device


@functools.cache
def _say_unmeasured() -> None:
    say("device mps: shortstack is tested and measured on CPUs and CUDA, not here; --device cpu is the way to compare")


def exact_place(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor where float64 can be computed: itself, or on the CPU where its device has none (mps)."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor


def pick_dtype(name: str, stored: str, device: torch.device) -> torch.dtype:
    """What to compute in: `auto` is float32 on a CPU and the checkpoint's own precision elsewhere.

    Args:
        name: auto, float32, bfloat16, float16 or float64.
        stored: the checkpoint's dtype as safetensors names it, such as BF16.
        device: where to compute.
    """
    import torch

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if name == "auto":
        own = {"BF16": torch.bfloat16, "F16": torch.float16}.get(stored, torch.float32)
        return torch.float32 if device.type == "cpu" else own
    if name == "float64" and device.type == "mps":
        raise UsageError("--dtype float64: mps has none", hint="--dtype float32, or --device cpu")
    if name not in dtypes:
        raise UsageError(f"--dtype {name}: unknown", hint=did_you_mean(name, ("auto", *dtypes)))
    return dtypes[name]
