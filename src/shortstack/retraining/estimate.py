"""What retraining, merging and teaching read and will leave behind, and what a run takes, from three measured steps."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.checkpoint.forecast import COPIES, Estimate, Forecast, Passes
from shortstack.common.formatting import count, size
from shortstack.data.instructions import kind_of
from shortstack.data.preview import READ_BYTES, preview
from shortstack.data.sources import read_corpus
from shortstack.errors import ShortstackError
from shortstack.pruning.budget import parse_amount
from shortstack.retraining.options import LoRA, Steps, TeachOptions, parse_tokens
from shortstack.runtime.atomic_output import absolute, check_output
from shortstack.runtime.distributed import Process
from shortstack.runtime.memory import peak_rss_bytes

if TYPE_CHECKING:
    from shortstack.checkpoint.reader import Checkpoint
    from shortstack.data.collators import Sharding
    from shortstack.data.loaders import Dataset
    from shortstack.retraining.losses import Objective
    from shortstack.retraining.options import Hyperparameters, TrainingOptions
    from shortstack.retraining.placement import Place


_STATE_BYTES = 12  # of each trained parameter in a saved state: itself and AdamW's two moments, in float32
_SAVED_STATES = 3  # the last two and the best
_KEPT_LOGIT_BYTES = 6  # a token id and a float16
_STORED_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_STEPS = 3
_MEASURED = "`retrain ... --dry-run` measures three steps, when its model is there"


def check_steps(steps: Steps) -> None:
    """Refuse steps that cannot be carried out, before anything runs.

    Raises:
        UsageError: a batch that micro-batches do not fill, or no number of tokens.
    """
    from shortstack.data.collators import Sharding

    Sharding(steps.batch, steps.micro_batch, world=Process.from_environment().world)
    parse_tokens(getattr(steps, "tokens", None))


def check_training(values: Mapping[str, Any]) -> list[str]:
    """Look at what is trained on and what is followed meanwhile; lines about what could not be looked at.

    Raises:
        ShortstackError: it cannot be used.
    """
    notes = []
    if data := values.get("data"):
        notes += preview(data, "training", functools.partial(kind_of, data))
    for text in filter(None, (values.get("eval_data") or "").split(",")):
        look = functools.partial(read_corpus, text, role="evaluation", limit_bytes=READ_BYTES)
        notes += preview(text, "evaluation", look)
    return notes


def estimate_training(values: Mapping[str, Any]) -> Estimate:
    """The checkpoint, and the saved states while it is trained."""
    model = _stored(values.get("model"), values)
    if model is None:
        return Estimate("checkpoint", untimed=_MEASURED)
    is_lora = values.get("train") == "lora"
    trained = _adapter_parameters(model, values) if is_lora else model.parameters
    makes = f"{len(model.kept)} blocks, {count(model.parameters)} parameters"
    return Estimate(makes, model.nbytes, _SAVED_STATES * _STATE_BYTES * trained, model, untimed=_MEASURED)


def estimate_lora(values: Mapping[str, Any]) -> Estimate:
    """The checkpoint with the adapter folded in, or the adapter alone."""
    estimate = estimate_training({**values, "train": "lora"})
    if estimate.forecast is None or values.get("merge", True):
        return estimate
    trained = _adapter_parameters(estimate.forecast, values)
    return Estimate(
        f"an adapter of {count(trained)} parameters", 4 * trained, estimate.temporary_nbytes, untimed=_MEASURED
    )


def estimate_local(values: Mapping[str, Any]) -> Estimate:
    """The checkpoint; meanwhile the blocks that are done, the state of one, and hidden states, where they lie on disk."""
    estimate = estimate_training({**values, "train": "all"})
    if estimate.forecast is None:
        return estimate
    model = estimate.forecast
    largest = max(model.checkpoint.block_parameters())
    return dataclasses.replace(estimate, temporary_nbytes=model.nbytes + _SAVED_STATES * _STATE_BYTES * largest)


def estimate_merge(values: Mapping[str, Any]) -> Estimate:
    """The base, with the adapter folded in."""
    base = _stored(values.get("base"), values)
    if base is None:
        return Estimate("checkpoint")
    makes = f"{len(base.kept)} blocks, {count(base.parameters)} parameters"
    return Estimate(makes, base.nbytes, forecast=base, untimed=COPIES)


def estimate_teach(values: Mapping[str, Any]) -> Estimate:
    """The cached logits, where it is said of how many tokens."""
    tokens = values.get("tokens")
    kept = values.get("top_k", TeachOptions.top_k) * _KEPT_LOGIT_BYTES
    if not tokens:
        return Estimate("teacher logits")
    number, model = parse_amount(tokens, "tokens", "tokens"), values.get("model")
    passes = (Passes(model, number * len(model.kept), number),) if isinstance(model, Forecast) else ()
    return Estimate("teacher logits", number * kept, passes=passes)


def _stored(model: Forecast | None, values: Mapping[str, Any]) -> Forecast | None:
    """The model in the precision that it will be stored in."""
    dtype = values.get("save_dtype")
    if model is None or dtype is None:
        return model
    return dataclasses.replace(model, stored=_STORED_BYTES[dtype])


def _adapter_parameters(model: Forecast, values: Mapping[str, Any]) -> int:
    """Of factors beside every chosen matrix of the blocks that stay."""
    lora = LoRA(rank=values.get("rank", LoRA.rank), target_modules=values.get("target_modules"))
    blocks = [model.checkpoint.blocks[position] for position in model.kept]
    matrices = [tensor for block in blocks for tensor in block if len(tensor.shape) == 2]
    return sum(lora.rank * sum(tensor.shape) for tensor in matrices if lora.adapts(tensor.name.removesuffix(".weight")))


def beside_the_steps(checkpoint: Checkpoint, out: Path, trained: int, *, force: bool) -> list[str]:
    """Lines about what three steps do not tell: the output, the disk, and what comes on top.

    Args:
        checkpoint: what would be trained.
        out: what would be written.
        trained: parameters that are trained.
        force: an output that is there may be replaced.
    """
    notes = []
    try:
        check_output(out, inputs=[checkpoint.directory], force=force)
    except ShortstackError as error:
        notes.append(f"would fail: {error.message}" + (f" ({error.hint})" if error.hint else ""))
    folder = next(one for one in absolute(out).parents if one.exists())
    needed = checkpoint.nbytes + _SAVED_STATES * _STATE_BYTES * trained
    free = shutil.disk_usage(folder).free
    notes.append(f"disk: about {size(needed)} needed while it trains, {size(free)} free")
    return [*notes, "not measured, and on top: the time and memory of validation and of saving"]


def measured_estimate(
    model: Any,
    objective: Objective,
    dataset: Dataset,
    sharding: Sharding,
    place: Place,
    *,
    options: TrainingOptions,
    hyperparameters: Hyperparameters,
) -> tuple[float, dict[str, int]]:
    """(seconds per optimizer step, bytes per device by what they are for), from three steps of one micro-batch each.

    The model is trained a little in them: it is not to be used after that. Weights, gradients and optimizer state are
    counted; activations are what was measured beyond them.
    """
    import torch

    from shortstack.data.collators import predicted_tokens
    from shortstack.runtime.stopwatch import now

    cuda = torch.cuda if place.device.type == "cuda" else None
    model.to(place.device).train()
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=hyperparameters.learning_rate, betas=hyperparameters.betas)
    batches = iter(dataset.loader(sharding, 0, _STEPS, {}, 0))
    before = cuda.max_memory_allocated(place.device) if cuda else peak_rss_bytes()
    pass_seconds, update_seconds = [], []
    with torch.enable_grad():
        for _ in range(_STEPS):
            batch = {key: value.to(place.device) for key, value in next(batches).items() if hasattr(value, "to")}
            started = now(place.device)
            with torch.autocast(place.device.type, place.dtype, enabled=place.dtype != torch.float32):
                loss = objective(model, batch)["loss"] / max(1, predicted_tokens(batch))
            loss.backward()  # type: ignore[no-untyped-call]
            passed = now(place.device)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            pass_seconds.append(passed - started)
            update_seconds.append(now(place.device) - passed)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    gradients = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    after = cuda.max_memory_allocated(place.device) if cuda else peak_rss_bytes()
    activations = max(0, after - before - 3 * gradients)  # AdamW's two moments are as large as the gradients
    # The first step allocates; the median of three is one of the others.
    seconds = sorted(pass_seconds)[1] * sharding.accumulation + sorted(update_seconds)[1]
    memory = {"weights": weights, "gradients": gradients, "optimizer": 2 * gradients, "activations": activations}
    if place.is_sharded:
        memory = {name: size if name == "activations" else size // sharding.world for name, size in memory.items()}
    return seconds, memory
