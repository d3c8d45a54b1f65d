"""The options of scoring: when windows are enough, and how the run computes. Those of windows: data/calibration.py."""

from __future__ import annotations

from dataclasses import dataclass

from shortstack.checkpoint.options import CheckpointOptions, ComputeOptions
from shortstack.common.option_values import Amount
from shortstack.common.options import Options
from shortstack.engine.select import MemoryMode
from shortstack.runtime.devices import Kernels
from shortstack.scoring.early_stopping import Rounds, Until


@dataclass(frozen=True)
class StoppingOptions(Options):
    """When enough windows are drawn.

    Attributes:
        until: Add windows until the choice is stable: `stable` adds rounds of `samples` windows until the `remove`
            blocks with the lowest scores have not changed for three rounds, or are below all others by more than the
            errors. It needs `ppl` as the only criterion.
        remove: The number of blocks to remove, for `until`.
        plus: Keep the first four and the last two blocks, for `until`. By default this is on for models of at least 10
            blocks.
        max_samples: The largest number of windows that `until` draws.
    """

    until: Until | None = None
    remove: int | None = None
    plus: bool | None = None
    max_samples: int = 500


@dataclass(frozen=True)
class ScoreOptions(ComputeOptions, CheckpointOptions):
    """How a scoring run computes.

    Attributes:
        dtype: The data type to compute in. `auto` is bfloat16 on a GPU (float16 if the checkpoint is), and float32 on a
            CPU unless the checkpoint is bfloat16 and the CPU has instructions for it (`avx512_bf16` or `amx_bf16`).
        cpu_kernels: The library for float32 matrix products on a CPU. `auto` is oneDNN on AMD CPUs, and torch's own
            choice on all others (MKL on Intel CPUs).
        memory: How much of the model is in memory: `streamed` holds two blocks at a time, `resident` the whole model.
            `auto` is `resident` if the model fits well.
        memory_limit: The memory limit of hidden states, such as `4GB`. By default it is 60 % of the free memory. If
            they do not fit, blocks are scored in groups, and the weights are read once for each group.
        save_every: The number of seconds between two saved states beside `out`. A killed run resumes from the last one.
    """

    cpu_kernels: Kernels = "auto"
    memory: MemoryMode = "auto"
    memory_limit: Amount | None = None
    save_every: float = 60.0


@dataclass(frozen=True)
class SweepRequest:
    """What of a model is scored at once.

    Attributes:
        candidates: positions of the blocks to score, ascending; all by default.
        rounds: add windows in rounds until they are enough.
        memory_bytes: the most that all hidden states may take; by default 60 % of the memory that is free.
        stream_bytes: the most that streams may take at once; by default what `memory_bytes` leaves them.
    """

    candidates: tuple[int, ...] | None = None
    rounds: Rounds | None = None
    memory_bytes: int | None = None
    stream_bytes: int | None = None
