"""What tensors take in memory, counted."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch


def live_bytes() -> int:
    """Bytes of all storages of tensors that are alive."""
    storages = {}
    for found in gc.get_objects():
        if isinstance(found, torch.Tensor) and not found.is_meta:
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@contextlib.contextmanager
def peak_after(*methods: tuple[type, str]) -> Iterator[list[int]]:
    """Within, living bytes are counted after each call of these methods; the number given is the most that came on top."""
    gc.collect()
    before, peak = live_bytes(), [0]

    def counted(*given: Any, real: Callable[..., Any]) -> Any:
        result = real(*given)
        peak[0] = max(peak[0], live_bytes() - before)
        return result

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in methods:
            real = getattr(owner, name)
            patch.setattr(owner, name, lambda *given, real=real: counted(*given, real=real))
        yield peak
