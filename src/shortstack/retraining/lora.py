"""LoRA: small factors beside every projection are trained; the published way to heal mild pruning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shortstack.common.extras import need_packages
from shortstack.common.options import records_of, refuse_idle, stage
from shortstack.retraining.estimate import check_steps, check_training
from shortstack.retraining.options import Hyperparameters, LoRA, RowSteps, TrainingOptions, parse_tokens
from shortstack.retraining.results import RetrainEstimate, RetrainResult
from shortstack.retraining.run import retrain

_LORA, _STEPS, _DEFAULTS = LoRA(), RowSteps(), TrainingOptions()


@stage
def retrain_lora(
    model: str,
    *,
    data: str,
    out: Path,
    lora: LoRA = _LORA,
    steps: RowSteps = _STEPS,
    merge: bool = True,
    load_in_4bit: bool = False,
    options: TrainingOptions = _DEFAULTS,
) -> RetrainResult | RetrainEstimate | None:
    """Train a LoRA adapter on a checkpoint, and merge it into a plain one.

    By default as published (Shortened LLaMA, arXiv 2402.02834): rank 8 on every projection of every block, AdamW with a
    linear schedule, the loss on responses alone, the checkpoint with the lowest validation loss.

    Args:
        model: a checkpoint directory, a hub id such as `org/name@revision`, or `embedded`.
        data: rows of `instruction`, `input` and `output`, or of `messages` (.json, .jsonl, .parquet, a folder, a hub set
            such as `alpaca-cleaned`); or text.
        out: the checkpoint to make; OUT/adapter is the adapter alone.
        lora: the adapter.
        steps: the steps of the optimizer.
        merge: fold the adapter into the weights; without, OUT holds the adapter alone.
        load_in_4bit: hold the base weights in 4 bit while training (QLoRA); needs bitsandbytes.
        options: how the run goes.

    Returns:
        Figures before, after and of the dense model; with `dry_run` what the run would be.

    Raises:
        ShortstackError: the checkpoint or data cannot be used, or the loss is no longer finite.
    """
    _check_request(merge, load_in_4bit, options)
    hyperparameters = Hyperparameters(
        method="lora",
        train="lora",
        learning_rate=steps.lr,
        schedule="linear",
        warmup_steps=steps.warmup,
        batch=steps.batch,
        micro_batch=steps.micro_batch,
        seq_len=steps.cutoff,
        keep="best",
        epochs=steps.epochs,
        tokens=parse_tokens(steps.tokens),
        lora=lora,
        group_by_length=steps.group_by_length,
        load_in_4bit=load_in_4bit,
    )
    return retrain(model, data, out, hyperparameters, options, merge=merge)


def _check_request(merge: bool, load_in_4bit: bool, options: TrainingOptions) -> None:
    if load_in_4bit:
        need_packages("--load-in-4bit", "bitsandbytes")
    if not merge:
        refuse_idle(options, ["save_dtype"], "with --no-merge: the adapter is written as it was trained")


def check_lora(values: Mapping[str, Any]) -> list[str]:
    """Look at options that contradict one another, and at the data; lines about what could not be looked at.

    Raises:
        ShortstackError: they do, or the data cannot be used.
    """
    records = records_of(retrain_lora, values)
    _check_request(values.get("merge", True), values.get("load_in_4bit", False), records["options"])
    check_steps(records["steps"])
    return check_training(values)
