"""Continued pretraining (CPT): all weights, on text; what works where much was removed."""

from __future__ import annotations

from pathlib import Path

from shortstack.retraining.hyperparameters import Hyperparameters, parse_tokens
from shortstack.retraining.options import TrainingOptions
from shortstack.retraining.results import RetrainEstimate, RetrainResult
from shortstack.retraining.run import retrain

BETAS = (0.9, 0.95)
_DEFAULTS = TrainingOptions()


def retrain_cpt(
    model: str,
    *,
    data: str,
    out: Path,
    train: str = "all",
    tokens: str | None = None,
    seq_len: int = 2048,
    lr: float = 1e-4,
    weight_decay: float = 0.1,
    batch: int = 512,
    micro_batch: int = 2,
    warmup: int = 100,
    isolate_documents: bool = True,
    options: TrainingOptions = _DEFAULTS,
) -> RetrainResult | RetrainEstimate | None:
    """Train a checkpoint further on text, as in pretraining.

    Texts are packed into windows, each document with its BOS and end of text. AdamW (0.9, 0.95), weight decay 0.1, a
    cosine schedule, 512 windows a step: the settings published with the CPT checkpoints of Shortened LLaMA.

    Args:
        model: a checkpoint directory, a hub id such as `org/name@revision`, or `embedded`.
        data: text: a .txt, .jsonl, .json or .parquet file, a folder, a hub set such as `c4`, or `embedded`. It is read as
            it is needed, however large.
        out: the checkpoint to make.
        train: what is trained: `all`, or some of `last:N`, `first:N`, `head`, `norm`, `embeddings`, separated by commas
            (`last:3,head,norm` is partial tuning as in Reassessing Layer Pruning).
        tokens: how many tokens to train on, such as `1B`; by default one pass over the text.
        seq_len: tokens per window; at most the model's positions.
        lr: the learning rate at the end of the warm-up.
        weight_decay: of AdamW.
        batch: windows per step, over all processes.
        micro_batch: windows at a time in one process.
        warmup: steps until the learning rate is reached; a tenth of a run that is too short for them.
        isolate_documents: attention stays within a document, in families where positions that start again do that.
        options: how the run goes.

    Returns:
        Figures before, after and of the dense model; with `dry_run` what the run would be.

    Raises:
        ShortstackError: the checkpoint or data cannot be used, or the loss is no longer finite.
    """
    hyperparameters = Hyperparameters(
        method="cpt",
        train=train,
        learning_rate=lr,
        schedule="cosine",
        warmup_steps=warmup,
        batch=batch,
        micro_batch=micro_batch,
        seq_len=seq_len,
        keep="last",
        tokens=parse_tokens(tokens),
        betas=BETAS,
        weight_decay=weight_decay,
        isolate_documents=isolate_documents,
    )
    return retrain(model, data, out, hyperparameters, options)
