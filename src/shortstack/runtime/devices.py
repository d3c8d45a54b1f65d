"""Devices and dtypes: where a model is computed, and in what precision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from shortstack.errors import ShortstackError, UsageError, did_you_mean, first_line

if TYPE_CHECKING:
    import torch

DType = Literal["auto", "float32", "bfloat16", "float16", "float64"]
_DEVICES = ("auto", "cpu", "cuda", "mps")


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU.

    Raises:
        ShortstackError: no such device here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        kind = name.partition(":")[0]
        if kind not in _DEVICES:
            hint = "did you mean cuda?" if kind == "gpu" else did_you_mean(kind, _DEVICES)
            raise UsageError(f"--device {name}: unknown", hint=hint) from None
        raise ShortstackError(f"--device {name}: not usable here ({first_line(error)})", hint="--device cpu") from None
    return device


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
    if name not in dtypes:
        raise UsageError(f"--dtype {name}: unknown", hint=did_you_mean(name, ("auto", *dtypes)))
    return dtypes[name]
