"""What tensors take in memory, counted."""

from __future__ import annotations

import gc

import torch


def live_bytes() -> int:
    """Bytes of all storages of tensors that are alive."""
    storages = {}
    for found in gc.get_objects():
        if isinstance(found, torch.Tensor) and not found.is_meta:
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
