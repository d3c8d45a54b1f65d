"""The options of scoring: when windows are enough, and how the run goes; those of the windows are in data/calibration.py."""

from __future__ import annotations

from dataclasses import dataclass

from shortstack.checkpoint.tokenizer_files import TokenizerOptions
from shortstack.common.option_values import Amount
from shortstack.common.options import Options
from shortstack.engine.select import MemoryMode
from shortstack.runtime.devices import DType, Kernels
from shortstack.scoring.early_stopping import Rounds, Until


@dataclass(frozen=True)
class StoppingOptions(Options):
    """When there are enough windows.

    Attributes:
        until: Add windows until they are enough: `stable` adds rounds of `samples`, until the blocks that `remove`
            takes away have not changed for three rounds, or are below all others beyond the errors. It needs the
            criterion ppl alone.
        remove: The number of blocks that would be removed, for `until`.
        plus: Keep the first four and the last two blocks, for `until`. By default they stay where there are at least 10
            blocks.
        max_samples: The most windows that `until` draws.
    """

    until: Until | None = None
    remove: int | None = None
    plus: bool | None = None
    max_samples: int = 500


@dataclass(frozen=True)
class ScoreOptions(TokenizerOptions):
    """How a scoring run goes.

    Attributes:
        dtype: The data type to compute in. `auto` is bfloat16 on a GPU (float16 where the checkpoint is), and float32 on a
            CPU unless the checkpoint is bfloat16 and the CPU has units for it (`avx512_bf16` or `amx_bf16`).
        device: Where to compute: `cpu`, `cuda`, `cuda:N` or `mps`. `auto` takes CUDA, else the GPU of a Mac (`mps`),
            else the CPU.
        cpu_kernels: The library of float32 products on a CPU. `auto` is oneDNN on CPUs of AMD, and on all others what
            torch chooses (MKL on Intel's).
        memory: How the model is held: `streamed` holds two blocks at a time, `resident` keeps all of it, `auto` keeps a
            model that fits well.
        memory_limit: The most memory that hidden states may take, such as `4GB`. By default it is 60 % of what is free.
            What does not fit is swept in groups of blocks, and the weights are read once for each.
        save_every: The seconds between two saved states beside `out`, from which a killed run resumes when it is
            started again.
        trust_remote_code: Run code that comes with the checkpoint.
        allow_links: Follow links in the checkpoint that lead out of its directory.
        quiet: Show no progress on stderr.
    """

    dtype: DType = "auto"
    device: str = "auto"
    cpu_kernels: Kernels = "auto"
    memory: MemoryMode = "auto"
    memory_limit: Amount | None = None
    save_every: float = 60.0
    trust_remote_code: bool = False
    allow_links: bool = False
    quiet: bool = False


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
