"""LoRA: small factors beside every projection are trained; the published way to heal mild pruning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shortstack.common.extras import need_packages
from shortstack.common.options import records_of, refuse_idle, stage
from shortstack.data.row_prompt import PromptOptions
from shortstack.retraining.estimate import check_steps, check_training
from shortstack.retraining.options import AdapterUse, Hyperparameters, LoRA, RowSteps, TrainingOptions, parse_tokens
from shortstack.retraining.results import RetrainEstimate, RetrainResult
from shortstack.retraining.run import retrain
from shortstack.retraining.whole_run import whole_model

_LORA, _USE, _PROMPT, _STEPS, _DEFAULTS = LoRA(), AdapterUse(), PromptOptions(), RowSteps(), TrainingOptions()


@stage
def retrain_lora(
    model: str,
    *,
    data: str,
    out: Path,
    lora: LoRA = _LORA,
    prompt: PromptOptions = _PROMPT,
    steps: RowSteps = _STEPS,
    use: AdapterUse = _USE,
    options: TrainingOptions = _DEFAULTS,
) -> RetrainResult | RetrainEstimate | None:
    """Train a LoRA adapter on a checkpoint, and merge it into a plain checkpoint.

    The defaults are those of Shortened LLaMA (arXiv 2402.02834): rank 8 on every projection of every block, AdamW with
    a linear schedule, a loss of responses only, and the checkpoint with the lowest validation loss.

    Source: LoRA (Hu et al. 2021, arXiv 2106.09685), with the settings of Shortened LLaMA.

    Args:
        model: The checkpoint: a directory, a hub id such as `org/name@revision`, or `embedded`.
        data: The data to train on: rows with the fields instruction, input and output, or messages (.json, .jsonl,
            .parquet, a folder, a data set on the hub such as `alpaca-cleaned`); or text.
        out: Write the checkpoint to this directory, and the adapter to OUT/adapter.
        lora: the adapter.
        prompt: how rows become text.
        steps: the steps of the optimizer.
        use: what the adapter is trained on, and what becomes of it.
        options: how the run computes.

    Returns:
        Figures before, after and of the dense model; with `dry_run`, the forecast of the run.

    Raises:
        ShortstackError: the checkpoint or data cannot be used, or the loss is no longer finite.
    """
    _check_request(use, options)
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
        prompt=prompt.read(),
        group_by_length=steps.group_by_length,
        load_in_4bit=use.load_in_4bit,
    )
    return retrain(model, data, out, hyperparameters, options, whole_model(merge=use.merge))


def _check_request(use: AdapterUse, options: TrainingOptions) -> None:
    if use.load_in_4bit:
        need_packages("--load-in-4bit", "bitsandbytes")
    if not use.merge:
        refuse_idle(options, ["save_dtype"], "with --no-merge: the adapter is written as it was trained")


def check_lora(values: Mapping[str, Any]) -> list[str]:
    """Look at options that contradict one another, and at template and data; lines about what could not be looked at.

    Raises:
        ShortstackError: they do, or one cannot be used.
    """
    records = records_of(retrain_lora, values)
    _check_request(records["use"], records["options"])
    check_steps(records["steps"])
    records["prompt"].read()
    return check_training(values)
