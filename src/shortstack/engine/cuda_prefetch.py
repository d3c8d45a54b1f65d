"""Weights onto a GPU while it computes: from pinned memory, on a stream of their own.

Two sets of device tensors take turns. The copying stream waits for the computation that last used a set, the computing
stream for the copy that fills one; the host waits for neither, only for pinned memory that it is to fill again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from shortstack.engine.storage import Arrived


class Transfer:
    """Copies one block's raw tensors after another to a CUDA device, in the precision computed in.

    Args:
        device: a CUDA device.
        computed_dtype: what a stored dtype is computed in.
        within_block: a tensor's name without the block's number: blocks of the same shapes use the same memory.
    """

    def __init__(
        self,
        device: torch.device,
        computed_dtype: Callable[[torch.dtype], torch.dtype],
        within_block: Callable[[str], str],
    ) -> None:
        self._device = device
        self._computed_dtype = computed_dtype
        self._within_block = within_block
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._memory: dict[tuple[int, str, tuple[int, ...], torch.dtype], torch.Tensor] = {}
        self._sent: dict[int, torch.cuda.Event] = {}
        self._used: dict[int, torch.cuda.Event] = {}

    def wait_for_pinned(self, slot: int) -> None:
        """Wait until pinned memory of a slot has been copied away."""
        if slot in self._sent:
            self._sent[slot].synchronize()

    def send(self, raw: dict[str, torch.Tensor], slot: int, *, keep: bool) -> Arrived:
        """Queue the copies of a slot's pinned tensors.

        Args:
            keep: into memory of their own, for good; else into the slot's, which the next block in it overwrites.
        """
        with torch.cuda.stream(self._stream):
            if slot in self._used and not keep:
                self._stream.wait_event(self._used[slot])
            tensors = {}
            for name, value in raw.items():
                dtype = self._computed_dtype(value.dtype)
                staged = self._tensor(slot, name, value.dtype, value, keep and dtype == value.dtype)
                staged.copy_(value, non_blocking=True)
                tensors[name] = staged
                if dtype != value.dtype:
                    tensors[name] = self._tensor(slot, name, dtype, value, keep).copy_(staged)
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record(self._stream)
        self._sent[slot] = ready
        return Arrived(tensors, ready)

    def used(self, slot: int) -> None:
        """What has been queued until now uses a slot's tensors; what comes later does not."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        self._used[slot] = event

    def close(self) -> None:
        """Let the slots' memory go, once what has been queued is done with it."""
        for tensor in self._memory.values():
            tensor.record_stream(torch.cuda.current_stream(self._device))
        self._memory.clear()

    def _tensor(self, slot: int, name: str, dtype: torch.dtype, like: torch.Tensor, keep: bool) -> torch.Tensor:
        if keep:
            return torch.empty(like.shape, dtype=dtype, device=self._device)
        key = (slot, self._within_block(name), tuple(like.shape), dtype)
        if key not in self._memory:
            self._memory[key] = torch.empty(like.shape, dtype=dtype, device=self._device)
        return self._memory[key]
