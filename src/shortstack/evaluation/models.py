"""Load a checkpoint for evaluation, whole, through transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shortstack.checkpoint.reader import Checkpoint
from shortstack.errors import ShortstackError
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
    from transformers import AutoModelForCausalLM

    from shortstack.verifying import quiet_transformers

    place = pick_device(device)
    computed = pick_dtype(dtype, checkpoint.tensors[checkpoint.anatomy.embedding].dtype, place)
    needed = checkpoint.parameters() * torch.empty(0, dtype=computed).element_size()
    free = available_bytes(place)
    if needed > free:
        raise ShortstackError(
            f"{checkpoint.source}: {needed / 1e9:.1f} GB of weights in {computed}, {free / 1e9:.1f} GB free on {place}",
            hint="--dtype bfloat16 halves it",
        )
    try:
        with quiet_transformers():
            model, info = AutoModelForCausalLM.from_pretrained(
                checkpoint.directory, dtype=computed, trust_remote_code=trust_remote_code, output_loading_info=True
            )
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ShortstackError(f"{checkpoint.source}: transformers cannot load it: {reason}") from None
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise ShortstackError(
            f"{checkpoint.source}: the weights lack {missing[0]!r} ({len(missing)}), which would be random"
        )
    return model.to(place).eval(), computed, place
