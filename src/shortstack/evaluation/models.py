"""Load a checkpoint for evaluation, whole, through transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shortstack.checkpoint.reader import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.loading import load_with_transformers
from shortstack.machine import DType, available_bytes, pick_device, pick_dtype

if TYPE_CHECKING:
    import torch


def load_model(
    checkpoint: Checkpoint, *, dtype: DType, device: str, trust_remote_code: bool = False
) -> tuple[Any, torch.dtype, torch.device]:
    """(model in evaluation mode, dtype, device).

    Raises:
        ShortstackError: it does not fit, or transformers cannot load it without inventing weights.
    """
    import torch

    place = pick_device(device)
    computed = pick_dtype(dtype, checkpoint.tensors[checkpoint.anatomy.embedding].dtype, place)
    needed = checkpoint.parameters() * torch.empty(0, dtype=computed).element_size()
    free = available_bytes(place)
    if needed > free:
        raise ShortstackError(
            f"{checkpoint.source}: {needed / 1e9:.1f} GB of weights in {computed}, {free / 1e9:.1f} GB free on {place}",
            hint="--dtype bfloat16 halves it",
        )
    model, info = load_with_transformers(checkpoint, dtype=computed, trust_remote_code=trust_remote_code)
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise ShortstackError(
            f"{checkpoint.source}: the weights lack {missing[0]!r} ({len(missing)}), which would be random"
        )
    return model.to(place), computed, place
