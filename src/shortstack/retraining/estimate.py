"""What a run would take, from three measured steps of it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from shortstack.data.collators import predicted_tokens
from shortstack.runtime.memory import peak_rss_bytes

if TYPE_CHECKING:
    from shortstack.data.collators import Shares
    from shortstack.data.loaders import Feed
    from shortstack.retraining.hyperparameters import Hyperparameters
    from shortstack.retraining.losses import Objective
    from shortstack.retraining.options import TrainingOptions
    from shortstack.retraining.placement import Place

_STEPS = 3


def measured_estimate(
    model: Any,
    objective: Objective,
    feed: Feed,
    shares: Shares,
    place: Place,
    *,
    options: TrainingOptions,
    hyperparameters: Hyperparameters,
) -> tuple[float, dict[str, int]]:
    """(seconds per optimizer step, bytes per device by what they are for), from three steps of one micro-batch each.

    The model is trained a little in them: it is not to be used after that. Weights, gradients and optimizer state are
    counted; activations are what was measured beyond them.
    """
    model.to(place.device)
    model.train()
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=hyperparameters.learning_rate, betas=hyperparameters.betas)
    batches = iter(feed.loader(shares, 0, _STEPS, {}, 0))
    before = _used(place)
    pass_seconds, update_seconds = [], []
    with torch.enable_grad():
        for _ in range(_STEPS):
            batch = {key: value.to(place.device) for key, value in next(batches).items() if hasattr(value, "to")}
            started = time.perf_counter()
            with torch.autocast(place.device.type, place.dtype, enabled=place.dtype != torch.float32):
                loss = objective(model, batch)["loss"] / max(1, predicted_tokens(batch))
            loss.backward()  # type: ignore[no-untyped-call]
            _wait(place)
            passed = time.perf_counter()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            _wait(place)
            pass_seconds.append(passed - started)
            update_seconds.append(time.perf_counter() - passed)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    gradients = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    states = 2 * gradients
    activations = max(0, _used(place) - before - gradients - states)
    # The first step allocates; the median of three is one of the others.
    seconds = sorted(pass_seconds)[1] * shares.accumulation + sorted(update_seconds)[1]
    memory = {"weights": weights, "gradients": gradients, "optimizer": states, "activations": activations}
    if place.is_sharded:
        memory = {name: size if name == "activations" else size // shares.world for name, size in memory.items()}
    return seconds, memory


def _used(place: Place) -> int:
    if place.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(place.device))
    return peak_rss_bytes()


def _wait(place: Place) -> None:
    if place.device.type == "cuda":
        torch.cuda.synchronize(place.device)
