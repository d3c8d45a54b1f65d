"""The options that all ways of retraining share: one record, which the command line shows as plain options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cyclopts import Parameter

from shortstack.runtime.devices import DType

SaveDType = Literal["float32", "bfloat16", "float16"]


@Parameter(name="*")  # on the command line each field is an option of its own
@dataclass(frozen=True)
class TrainingOptions:
    """How a retraining run goes, whatever it trains.

    Attributes:
        max_steps: stop after this many optimizer steps, whatever the data.
        save_every: steps between two checkpoints; a killed run goes on from the last one.
        eval_every: steps between two evaluations on what is held out and on the texts of `eval_data`.
        log_every: steps between two lines of progress.
        validation: how many rows or windows are held out; by default 2000 rows or 200 windows, or a tenth of few rows.
        eval_data: texts whose perplexity (windows of 128, as published) is followed, separated by commas.
        eval_windows: at most this many windows of each of these texts; by default all.
        dense: the checkpoint that was pruned, for the table at the end; by default where shortstack.json says it is.
        dtype: what to compute in; `auto` is float32 on a CPU, bfloat16 on a GPU that knows it.
        device: `auto`, `cpu` or `cuda`.
        seed: of the split, the order, the dropout and the adapter's beginning.
        save_dtype: what to store the result in; by default each tensor as the checkpoint has it.
        gradient_checkpointing: compute activations twice instead of keeping them; by default on a GPU for whole models.
        workers: processes that prepare batches; they divide the work of each step among them.
        report_to: `tensorboard`, `trackio` or `wandb`, besides metrics.jsonl.
        dry_run: train nothing: say what would be trained, tokens, steps, memory, and time from three measured steps.
        restart: begin anew, even where a killed run could go on.
        weights_only_resume: go on from a checkpoint that lost its optimizer, schedule or random state, with fresh ones.
        force: replace an output that shortstack made before; go on with a run that was begun with other settings.
        trust_remote_code: run code that comes with the checkpoint.
        quiet: no progress on stderr.
    """

    max_steps: int | None = None
    save_every: int = 200
    eval_every: int = 100
    log_every: int = 10
    validation: int | None = None
    eval_data: str | None = None
    eval_windows: int | None = None
    dense: str | None = None
    dtype: DType = "auto"
    device: str = "auto"
    seed: int = 42
    save_dtype: SaveDType | None = None
    gradient_checkpointing: bool | None = None
    workers: int = 0
    report_to: str | None = None
    dry_run: bool = False
    restart: bool = False
    weights_only_resume: bool = False
    force: bool = False
    trust_remote_code: bool = False
    quiet: bool = False
