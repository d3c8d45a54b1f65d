"""The options that commands on checkpoints share: how one is opened, and in what and on what it is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from shortstack.common.options import Options
from shortstack.runtime.devices import DType


@dataclass(frozen=True)
class CheckpointOptions(Options):
    """How a checkpoint is opened, whatever is done with it.

    Attributes:
        tokenizer: Use the tokenizer of this directory or hub id, if the checkpoint's own is wrong or missing.
        trust_remote_code: Run the Python code that comes with the checkpoint.
        allow_links: Follow symbolic links in the checkpoint that lead out of its directory.
        quiet: Show no progress on stderr.
    """

    LAST: ClassVar[tuple[str, ...]] = ("trust_remote_code", "allow_links", "quiet")

    tokenizer: str | None = None
    trust_remote_code: bool = False
    allow_links: bool = False
    quiet: bool = False


@dataclass(frozen=True)
class ComputeOptions(Options):
    """In what precision and on which device a model is computed.

    Attributes:
        dtype: The data type to compute in. `auto` is float32 on a CPU, and the checkpoint's own type on other devices.
        device: The device to compute on: `cpu`, `cuda`, `cuda:N` or `mps`. `auto` is CUDA if available, else the GPU of
            a Mac (`mps`), else the CPU.
    """

    dtype: DType = "auto"
    device: str = "auto"
