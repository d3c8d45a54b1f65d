"""The options that all evaluations share: one record, which the command line shows as plain options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cyclopts import Parameter

from shortstack.runtime.devices import DType


@Parameter(name="*")  # on the command line each field is an option of its own
@dataclass(frozen=True)
class EvaluationOptions:
    """How an evaluation runs, whatever it measures.

    Attributes:
        batch: rows at a time, or `auto`: as many as are fast.
        dtype: what to compute in; `auto` is float32 on a CPU, the checkpoint's own elsewhere.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        fresh: compute anew what an earlier run has found for the very same model, data and settings.
        trust_remote_code: run code that comes with the checkpoint.
        quiet: no progress on stderr.
    """

    batch: int | Literal["auto"] = "auto"
    dtype: DType = "auto"
    device: str = "auto"
    fresh: bool = False
    trust_remote_code: bool = False
    quiet: bool = False
