"""The options of scoring: when windows are enough, and how the run goes; those of the windows are in data/calibration.py."""

from __future__ import annotations

from dataclasses import dataclass

from shortstack.checkpoint.tokenizer_files import TokenizerOptions
from shortstack.common.option_values import Amount
from shortstack.engine.select import MemoryMode
from shortstack.runtime.devices import DType
from shortstack.scoring.early_stopping import Rounds, Until


@dataclass(frozen=True)
class StoppingOptions:
    """When there are enough windows.

    Attributes:
        until: `stable` adds windows in rounds of `samples`, until the blocks that `remove` takes away have not changed for
            three rounds, or are below all others beyond the errors; ppl alone.
        remove: with `until`: how many blocks would go.
        plus: with `until`: keep the first four and the last two blocks; by default where there are at least 10 blocks.
        max_samples: with `until`: the most windows.
    """

    until: Until | None = None
    remove: int | None = None
    plus: bool | None = None
    max_samples: int = 500


@dataclass(frozen=True)
class ScoreOptions(TokenizerOptions):
    """How a scoring run goes.

    Attributes:
        dtype: what to compute in; `auto` is bfloat16 on a GPU (float16 where the checkpoint is) and float32 on a CPU, unless
            the checkpoint is bfloat16, the run is long, and bfloat16 measures at least 1.3 times as fast there.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        memory: `streamed` holds two blocks, `resident` keeps all; `auto` keeps a model that fits well.
        memory_limit: the most that hidden states may take, such as `4GB`; by default 60 % of what is free. What does
            not fit is swept in groups of blocks, the weights being read once for each.
        save_every: with `--out`, seconds between two saved states, from which a killed run resumes when it is started
            again.
        trust_remote_code: run code that comes with the checkpoint.
        allow_links: follow links in the checkpoint that lead out of its directory.
        quiet: no progress on stderr.
    """

    dtype: DType = "auto"
    device: str = "auto"
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
