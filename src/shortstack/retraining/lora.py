"""LoRA: small factors beside every projection are trained; the published way to heal mild pruning."""

from __future__ import annotations

from pathlib import Path

from shortstack.retraining.hyperparameters import Hyperparameters, parse_tokens
from shortstack.retraining.options import TrainingOptions
from shortstack.retraining.results import RetrainEstimate, RetrainResult
from shortstack.retraining.run import retrain

_DEFAULTS = TrainingOptions()


def retrain_lora(
    model: str,
    *,
    data: str,
    out: Path,
    rank: int = 8,
    alpha: float = 16,
    dropout: float = 0.05,
    lr: float = 1e-4,
    epochs: float = 2,
    tokens: str | None = None,
    batch: int = 64,
    micro_batch: int = 4,
    cutoff: int = 256,
    warmup: int = 100,
    group_by_length: bool = False,
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
        rank: of the adapter.
        alpha: the adapter is scaled by alpha / rank.
        dropout: of the adapter's input.
        lr: the learning rate at the end of the warm-up.
        epochs: passes over the data.
        tokens: train on so many tokens instead, such as `10M`.
        batch: rows per step, over all processes.
        micro_batch: rows at a time in one process.
        cutoff: tokens after which a row is cut off; of text, tokens per window.
        warmup: steps until the learning rate is reached; a tenth of a run that is too short for them.
        group_by_length: put rows of like length into one batch: less padding, another order.
        merge: fold the adapter into the weights; without, OUT holds the adapter alone.
        load_in_4bit: hold the base weights in 4 bit while training (QLoRA); needs bitsandbytes.
        options: how the run goes.

    Returns:
        Figures before, after and of the dense model; with `dry_run` what the run would be.

    Raises:
        ShortstackError: the checkpoint or data cannot be used, or the loss is no longer finite.
    """
    from shortstack.common.extras import need_extra
    from shortstack.retraining.trainable import LoRA

    if load_in_4bit:
        need_extra("--load-in-4bit", "bitsandbytes")
    hyperparameters = Hyperparameters(
        method="lora",
        train="lora",
        learning_rate=lr,
        schedule="linear",
        warmup_steps=warmup,
        batch=batch,
        micro_batch=micro_batch,
        seq_len=cutoff,
        keep="best",
        epochs=epochs,
        tokens=parse_tokens(tokens),
        lora=LoRA(rank, alpha, dropout),
        group_by_length=group_by_length,
        load_in_4bit=load_in_4bit,
    )
    return retrain(model, data, out, hyperparameters, options, merge=merge)
