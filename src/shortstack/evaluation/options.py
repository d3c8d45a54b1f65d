"""The options of evaluation: how one runs, whatever it measures, and which texts and tasks it measures on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from shortstack.checkpoint.options import CheckpointOptions, ComputeOptions
from shortstack.common.option_values import Listed
from shortstack.common.options import Options

BosRule = Literal["first", "every", "both"]


@dataclass(frozen=True)
class EvaluationOptions(ComputeOptions, CheckpointOptions):
    """How an evaluation runs, whatever it measures.

    Attributes:
        batch: The number of rows in a batch. `auto` chooses a fast number.
        fresh: Compute every figure again, also those in the cache for the same model, data and settings.
    """

    LAST: ClassVar[tuple[str, ...]] = ("dtype", "device", "fresh", *CheckpointOptions.LAST)

    batch: int | Literal["auto"] = "auto"
    fresh: bool = False


@dataclass(frozen=True)
class TextOptions(Options):
    """The texts that perplexity is measured on, and the windows.

    Attributes:
        data: The texts, separated by commas: `embedded` (its held-out part), `wikitext2`, `ptb` or `c4` (the published
            split), a file, a folder, or a data set on the hub.
        data_dir: A folder with local copies of the published data sets. By default they come from the hub.
        seq_len: The lengths of the windows, separated by commas. By default they are 128, and 2048 if the model has as
            many positions.
        bos: The position of the beginning-of-text token (BOS): `first` puts it once in front of the text, as published;
            `every` puts it in front of each window; `both` measures both, which takes twice as long.
    """

    data: Listed = "embedded"
    data_dir: Path | None = None
    seq_len: Listed | None = None
    bos: BosRule = "first"


@dataclass(frozen=True)
class TaskOptions(Options):
    """The zero-shot tasks, and where their rows come from.

    Attributes:
        tasks: The names of the tasks, separated by commas. By default they are the published seven. Any task of the
            harness can be named.
        tasks_dir: A folder with the published files of each task, or with rows that have the fields query, choices and
            gold. By default the rows come from the hub.
    """

    tasks: Listed | None = None
    tasks_dir: Path | None = None


@dataclass(frozen=True)
class GenerationOptions(Options):
    """The generated texts of `eval all`.

    Attributes:
        dense: The model whose perplexity judges the texts, as in `shortstack eval generation`.
        seed: The seed of samples and probes.
    """

    dense: str | None = None
    seed: int = 1234
