"""Devices and dtypes: where a model is computed, and in what precision."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from shortstack.common.progress import say
from shortstack.errors import ShortstackError, UsageError, did_you_mean, first_line

if TYPE_CHECKING:
    import torch

DType = Literal["auto", "float32", "bfloat16", "float16", "float64"]
Kernels = Literal["auto", "onednn", "torch"]
_DEVICES = ("auto", "cpu", "cuda", "mps")
_BFLOAT16_UNITS = (
    "amx_bf16",
    "avx512_bf16",
)  # with either, products in bfloat16 were 1.7 to 3 times as fast as in float32
_CPU = Path("/proc/cpuinfo")  # tests put another file here


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
    say("device mps: shortstack is tested only on CPUs and CUDA; compare the results with those of --device cpu")


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
        raise UsageError("--dtype float64: not supported on mps", hint="--dtype float32, or --device cpu")
    if name not in dtypes:
        raise UsageError(f"--dtype {name}: unknown", hint=did_you_mean(name, ("auto", *dtypes)))
    return dtypes[name]


def pick_scoring_dtype(name: DType, stored: str, device: torch.device, *, say: Callable[[str], object]) -> torch.dtype:
    """What a scoring run computes in: `auto` is the fastest that keeps the order of the blocks.

    Args:
        name: the requested one. `auto` on a GPU is bfloat16, which GPUs are made for, also where the checkpoint is stored
            in float32, and float16 where it is float16. On a CPU it is float32, or bfloat16 where the checkpoint is stored
            in it and the CPU has units for it.
        stored: the checkpoint's dtype as safetensors names it, such as BF16.
        device: where to compute.
        say: is given a line where `auto` computes in less than float32, or in less than is stored.
    """
    computed = pick_dtype(name, stored, device)
    if name != "auto":
        return computed
    units = bfloat16_units()
    if device.type == "cpu" and stored == "BF16" and units:
        say(
            f"--dtype auto: bfloat16, because the checkpoint is stored in it and this CPU has instructions for it ({units})"
        )
        return pick_dtype("bfloat16", stored, device)
    if device.type == "cuda" and stored != "F16":
        computed = pick_dtype("bfloat16", stored, device)
    if computed.itemsize < {"F32": 4, "F64": 8}.get(stored, 0):
        say(f"--dtype auto: {str(computed).removeprefix('torch.')} on {device}; the checkpoint is stored in {stored}")
    return computed


def cpu_maker() -> str:
    """The CPU's maker as it names itself, such as `AuthenticAMD` or `GenuineIntel`; empty where Linux does not say."""
    return _cpu().get("vendor_id", "")


def bfloat16_units() -> str:
    """What the CPU multiplies bfloat16 with, in Linux's words: `amx_bf16` or `avx512_bf16`; empty where it has neither."""
    flags = _cpu().get("flags", "").split()
    return next((unit for unit in _BFLOAT16_UNITS if unit in flags), "")


@functools.cache
def _cpu() -> dict[str, str]:
    """What Linux says of the first processor."""
    try:
        first = _CPU.read_text(errors="replace").partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
