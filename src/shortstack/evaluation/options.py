"""The options of evaluation: how one runs, whatever it measures, and which texts and tasks it measures on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shortstack.checkpoint.tokenizer_files import TokenizerOptions
from shortstack.common.option_values import Listed
from shortstack.runtime.devices import DType

BosRule = Literal["first", "every", "both"]


@dataclass(frozen=True)
class EvaluationOptions(TokenizerOptions):
    """How an evaluation runs, whatever it measures.

    Attributes:
        batch: rows at a time, or `auto`: as many as are fast.
        dtype: what to compute in; `auto` is float32 on a CPU, the checkpoint's own elsewhere.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        fresh: compute anew what an earlier run has found for the very same model, data and settings.
        trust_remote_code: run code that comes with the checkpoint.
        allow_links: follow links in the checkpoint that lead out of its directory.
        quiet: no progress on stderr.
    """

    batch: int | Literal["auto"] = "auto"
    dtype: DType = "auto"
    device: str = "auto"
    fresh: bool = False
    trust_remote_code: bool = False
    allow_links: bool = False
    quiet: bool = False


@dataclass(frozen=True)
class TextOptions:
    """The texts that perplexity is measured on, and the windows.

    Attributes:
        data: texts, separated by commas: `embedded` (its held-out part), `wikitext2`, `ptb` or `c4` (the split that
            published figures are of), a file, a folder, or a hub set.
        data_dir: a folder with local copies of the published sets; by default they come from the hub.
        seq_len: window lengths, separated by commas; by default 128, and 2048 where the model has as many positions.
        bos: where the beginning-of-text token (BOS) goes: `first` puts it once in front of the text, as published; `every`
            in front of each window; `both` measures both, which takes twice as long.
    """

    data: Listed = "embedded"
    data_dir: Path | None = None
    seq_len: Listed | None = None
    bos: BosRule = "first"


@dataclass(frozen=True)
class TaskOptions:
    """The zero-shot tasks, and where their rows come from.

    Attributes:
        tasks: names separated by commas; by default the published seven. Any task of the harness can be named.
        tasks_dir: a folder with each task's own published files, or rows of `query`, `choices` and `gold`; by default the
            rows come from the hub.
    """

    tasks: Listed | None = None
    tasks_dir: Path | None = None


@dataclass(frozen=True)
class GenerationOptions:
    """The texts that models write when everything is evaluated.

    Attributes:
        dense: the model that judges what the others write, as of `eval generation`.
        seed: of draws and probes.
    """

    dense: str | None = None
    seed: int = 1234
