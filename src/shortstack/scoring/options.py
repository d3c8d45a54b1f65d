"""The options of scoring: what the windows are, when there are enough of them, and how the run goes."""

from __future__ import annotations

from dataclasses import dataclass

from shortstack.data.calibration import Sampling
from shortstack.engine.select import MemoryMode
from shortstack.runtime.devices import DType
from shortstack.scoring.early_stopping import Until


@dataclass(frozen=True)
class CalibrationOptions:
    """The windows of text that scores are computed on.

    Attributes:
        data: where calibration text comes from: `embedded`, a .txt, .jsonl, .json or .parquet file, a folder, or a set on
            the hub such as `bookcorpus`.
        samples: number of calibration windows.
        seq_len: tokens per window.
        seed: of the generator that draws the windows.
        sampling: `documents` draws windows from documents that are long enough, or from joined rows; `published` is the
            procedure of Shortened LLaMA.
        bos_every: begin every window with BOS, as published for Gemma.
        chat_template: render rows of `messages` through the tokenizer's chat template.
    """

    data: str = "embedded"
    samples: int = 10
    seq_len: int = 128
    seed: int = 1234
    sampling: Sampling = "documents"
    bos_every: bool = False
    chat_template: bool = False


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
class ScoreOptions:
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
    memory_limit: str | None = None
    save_every: float = 60.0
    trust_remote_code: bool = False
    allow_links: bool = False
    quiet: bool = False
