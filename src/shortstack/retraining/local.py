"""Block by block: each block of the pruned model learns the dense model's hidden states, in the memory of a few blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.options import records_of, refuse_idle, stage
from shortstack.common.progress import Progress
from shortstack.data.instructions import kind_of
from shortstack.errors import ShortstackError
from shortstack.families.open_model import check_pair, open_model
from shortstack.retraining.cpt import with_cosine
from shortstack.retraining.estimate import check_steps, check_training
from shortstack.retraining.local_options import BlockSteps, BlockTargets
from shortstack.retraining.options import TrainingOptions
from shortstack.retraining.results import RetrainEstimate, RetrainResult
from shortstack.retraining.run import retrain

_TARGETS, _STEPS, _DEFAULTS = BlockTargets(), BlockSteps(), TrainingOptions()
# Options of the other ways that have no effect here, and why.
_IDLE = {
    "max_steps": "with retrain local: --tokens and --epochs say how much every block is trained on",
    "eval_every": "with retrain local: a block is validated when it is done",
    "save_dtype": "with retrain local: every tensor keeps its data type",
    "gradient_checkpointing": "with retrain local: one block is trained at a time",
    "workers": "with retrain local: the text is read once, beforehand",
    "report_to": "with retrain local: its figures are in metrics.jsonl alone",
    "dense": "with retrain local: --of names the dense model",
}


@stage
def retrain_local(
    model: str,
    *,
    data: str,
    out: Path,
    of: str | None = None,
    targets: BlockTargets = _TARGETS,
    steps: BlockSteps = _STEPS,
    options: TrainingOptions = _DEFAULTS,
) -> RetrainResult | RetrainEstimate | None:
    """Train a pruned checkpoint block by block towards the dense model's hidden states, in the memory of a few blocks.

    Each block is trained so that its output is near to the hidden states of the dense model there. Its input is the
    output of the blocks before it, which are trained already. The blocks of both models are read one at a time, so
    neither model is in memory as a whole. Blocks that are not trained keep their bytes.

    Source: block-wise distillation, as in Puzzle (Bercovich et al. 2024, arXiv 2411.19146).

    Args:
        model: The pruned checkpoint: a directory, a hub id such as `org/name@revision`, or `embedded`.
        data: The data to train on: text, or rows of instructions. All tokens count equally, in prompts and responses.
        out: Write the checkpoint to this directory.
        of: The dense checkpoint that MODEL was pruned from. By default it is the one that shortstack.json names.
        targets: which blocks are trained, and what is compared.
        steps: the steps of the optimizer.
        options: how the run computes.

    Returns:
        Figures before, after and of the dense model; with `dry_run`, the forecast of the run.

    Raises:
        ShortstackError: model, dense model and data do not fit together, or hidden states are not finite.
    """
    from shortstack.retraining.local_run import block_by_block

    _refuse_idle(options)
    progress = Progress(quiet=True)
    pruned = open_model(model, allow_links=options.allow_links, tokenizer=options.tokenizer, progress=progress)
    dense = dense_model(pruned, of)
    hyperparameters = with_cosine(
        "local",
        steps,
        train="all" if targets.lora_rank is None else "lora",
        epochs=steps.epochs,
        weight_decay=steps.weight_decay,
        isolate_documents=kind_of(data) != "text",  # windows are run as they are; rows are apart anyway
        local={**targets.described(), "dense": dense.fingerprint},
    )
    options = dataclasses.replace(options, dense=dense.source)  # of the table at the end
    return retrain(model, data, out, hyperparameters, options, block_by_block(dense, targets.states))


def dense_model(pruned: Checkpoint, of: str | None) -> Checkpoint:
    """The dense model, whose states its blocks are trained towards.

    Raises:
        ShortstackError: it is not known, or not the one that was pruned.
    """
    source = of or (pruned.provenance or {}).get("source", pruned.source)
    dense = open_model(source, allow_links=pruned.allow_links, progress=Progress(quiet=True))
    check_pair(dense, pruned)
    if "quantization_config" in dense.config:
        raise ShortstackError(
            f"{dense.source}: is quantized; the teacher must have full-precision weights",
            hint="--of DENSE: the checkpoint before it was quantized",
        )
    return dense


def _refuse_idle(options: TrainingOptions) -> None:
    """Refuse what has no effect on blocks that are trained one at a time."""
    for name, why in _IDLE.items():
        refuse_idle(options, [name], why)


def check_local(values: Mapping[str, Any]) -> list[str]:
    """Look at options that contradict one another, and at the data; lines about what could not be looked at.

    Raises:
        ShortstackError: they do, or the data cannot be used.
    """
    records = records_of(retrain_local, values)
    _refuse_idle(records["options"])
    check_steps(records["steps"])
    return check_training(values)
