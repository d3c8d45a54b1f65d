"""Continued pretraining (CPT): all weights, on text; what works where much was removed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.common.option_values import Listed
from shortstack.common.options import records_of, stage
from shortstack.retraining.estimate import check_steps, check_training
from shortstack.retraining.options import DistillationSteps, Hyperparameters, TextSteps, TrainingOptions, parse_tokens
from shortstack.retraining.results import RetrainEstimate, RetrainResult
from shortstack.retraining.run import retrain
from shortstack.retraining.whole_run import whole_model

if TYPE_CHECKING:
    from shortstack.retraining.local_options import BlockSteps

BETAS = (0.9, 0.95)


def with_cosine(method: str, steps: TextSteps | DistillationSteps | BlockSteps, **more: Any) -> Hyperparameters:
    """The numbers of a run over windows with a learning rate that falls as a cosine: what its steps say, and `more`."""
    return Hyperparameters(
        method=method,
        learning_rate=steps.lr,
        schedule="cosine",
        warmup_steps=steps.warmup,
        batch=steps.batch,
        micro_batch=steps.micro_batch,
        seq_len=steps.seq_len,
        keep="last",
        tokens=parse_tokens(steps.tokens),
        betas=BETAS,
        **more,
    )


_STEPS, _DEFAULTS = TextSteps(), TrainingOptions()


@stage
def retrain_cpt(
    model: str,
    *,
    data: str,
    out: Path,
    train: Listed = "all",
    steps: TextSteps = _STEPS,
    options: TrainingOptions = _DEFAULTS,
) -> RetrainResult | RetrainEstimate | None:
    """Train a checkpoint further on text, as in pretraining.

    Texts are packed into windows, each document with BOS and end-of-text token. The defaults are those of the CPT
    checkpoints of Shortened LLaMA: AdamW (0.9, 0.95), weight decay 0.1, a cosine schedule, 512 windows per step.

    Source: Shortened LLaMA (Kim et al. 2024, arXiv 2402.02834), and its model cards.

    Args:
        model: The checkpoint: a directory, a hub id such as `org/name@revision`, or `embedded`.
        data: The text to train on: a .txt, .jsonl, .json or .parquet file, a folder, a data set on the hub such as
            `c4`, or `embedded`. It is streamed, so it can be of any size.
        out: Write the checkpoint to this directory.
        train: The parameters to train: `all`, or some of `last:N`, `first:N`, `head`, `norm`, `embeddings`, separated
            by commas (`last:3,head,norm` is partial tuning as in Reassessing Layer Pruning).
        steps: the steps of the optimizer.
        options: how the run computes.

    Returns:
        Figures before, after and of the dense model; with `dry_run`, the forecast of the run.

    Raises:
        ShortstackError: the checkpoint or data cannot be used, or the loss is no longer finite.
    """
    hyperparameters = with_cosine(
        "cpt",
        steps,
        train=train,
        weight_decay=steps.weight_decay,
        isolate_documents=steps.isolate_documents,
    )
    return retrain(model, data, out, hyperparameters, options, whole_model())


def check_cpt(values: Mapping[str, Any]) -> list[str]:
    """Look at the steps, and at the data; lines about what could not be looked at.

    Raises:
        ShortstackError: they cannot be used.
    """
    check_steps(records_of(retrain_cpt, values)["steps"])
    return check_training(values)
