"""Bring one block's weights in, the next one in the background, let the last one go.

Weights come by positioned reads (`storage.py`), never by mmap: a file that shrinks is an error in words. Streamed, they come
into two reusable buffers; on CUDA the buffers are pinned, and a second stream copies from them. Resident means that blocks,
once read, are kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from shortstack.checkpoint.headers import TensorInfo
from shortstack.checkpoint.reader import Checkpoint
from shortstack.engine.storage import Buffer, OpenFiles
from shortstack.engine.weight_conversion import Conversion, Part
from shortstack.errors import ShortstackError
from shortstack.runtime.memory import return_free_memory

if TYPE_CHECKING:
    from shortstack.engine.block_model import Skeleton

# In blocks: memory that the allocator gives back must be fetched again, which after every block takes 5 % of the time.
_FREED_EVERY = 4
# With gradients, tensors of several lifetimes leave more holes between them.
_FREED_EVERY_WITH_GRADIENTS = 2


class BlockWeights:
    """Gives blocks with their weights in, in any order that is announced; reads one block ahead.

    Args:
        skeleton: the model whose blocks, parameters on the meta device, get their weights.
        resident: keep every block once it was read.
        past_cache: read without the page cache what it does not hold.

    Attributes:
        skeleton: the model.

    Raises:
        ShortstackError: a block has a parameter that no stored tensor makes.
    """

    def __init__(self, skeleton: Skeleton, *, resident: bool, past_cache: bool = False) -> None:
        self.skeleton = skeleton
        self._checkpoint = skeleton.checkpoint
        self._conversion = skeleton.conversion
        self._blocks = skeleton.blocks
        self._block_names = [f"{skeleton.blocks_name}.{index}." for index in range(len(skeleton.blocks))]
        self._dtype = skeleton.dtype
        self._device = skeleton.device
        self._resident = resident
        self._files = OpenFiles(past_cache=past_cache and not resident)
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shortstack-weights")
        self._kept: dict[int, Arrived] = {}
        self._targets: dict[str, torch.Tensor] = {}
        self._parts = [self._checked_parts(index) for index in range(len(skeleton.blocks))]
        stored = {name for parts in self._parts for part in parts for name, _ in part.sources}
        self._stored = [[t for t in block if t.name in stored] for block in self._checkpoint.blocks]

    def __enter__(self) -> BlockWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let files and the reading thread go."""
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._files.close()

    def read_instead(self, index: int, tensors: Sequence[TensorInfo]) -> None:
        """Take some of a block's tensors from elsewhere from now on: those with the same names, types and shapes."""
        by_name = {tensor.name: tensor for tensor in tensors}
        self._stored[index] = [by_name.get(tensor.name, tensor) for tensor in self._stored[index]]
        self._kept.pop(index, None)

    def each(self, order: Sequence[int], *, gradients: bool = False) -> Iterator[tuple[int, nn.Module]]:
        """Yield (index, block with its weights in) in this order; a block is released when the next one is requested.

        Args:
            order: block indices.
            gradients: make the weights ask for gradients, where they are floating point.
        """
        on_cuda = self._device.type == "cuda"
        buffers: list[Buffer] = []  # held while the sweep lasts: what comes after it needs the memory
        if (on_cuda or not self._resident) and any(index not in self._kept for index in order):
            largest = max(self._files.buffer_bytes(block) for block in self._stored)
            buffers = [Buffer(largest, pinned=on_cuda), Buffer(largest, pinned=on_cuda)]
        freed_every = _FREED_EVERY_WITH_GRADIENTS if gradients else _FREED_EVERY
        transfer = Transfer(self._device, self._computed, self._within_block) if on_cuda and buffers else None
        pending: Future[Arrived] | None = None
        try:
            for step, index in enumerate(order):
                arrived = (pending or self._reader.submit(self._read, index, buffers, step % 2, transfer)).result()
                pending = None
                following = order[step + 1] if step + 1 < len(order) else None
                if following is not None:
                    pending = self._reader.submit(self._read, following, buffers, (step + 1) % 2, transfer)
                block = self._blocks[index]
                _assign(block, self._parameters(index, arrived.wait()), gradients)
                try:
                    yield index, block
                finally:
                    _release(block)
                    if transfer is not None:
                        transfer.used(step % 2)
                    if not self._resident and (step + 1) % freed_every == 0:
                        return_free_memory()
        finally:
            if pending is not None:
                with contextlib.suppress(ShortstackError):
                    pending.result()
            self._targets.clear()
            if transfer is not None:
                transfer.close()

    def _read(self, index: int, buffers: Sequence[Buffer], slot: int, transfer: Transfer | None = None) -> Arrived:
        """Runs in the reading thread, one block ahead."""
        if index in self._kept:
            return self._kept[index]
        tensors = self._stored[index]
        if transfer is not None:
            transfer.wait_for_pinned(slot)
            arrived = transfer.send(buffers[slot].fill(tensors, self._files), slot, keep=self._resident)
        elif self._resident:
            raw = Buffer(self._files.buffer_bytes(tensors)).fill(tensors, self._files)  # no other block's memory
            arrived = Arrived({name: value.to(self._computed(value.dtype)) for name, value in raw.items()})
        else:
            arrived = Arrived(buffers[slot].fill(tensors, self._files))
        if self._resident:
            self._kept[index] = arrived
        return arrived

    def _computed(self, stored: torch.dtype) -> torch.dtype:
        return self._dtype if stored.is_floating_point else stored

    def _within_block(self, name: str) -> str:
        return self._checkpoint.anatomy.within_block(name)

    def _parameters(self, index: int, raw: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The block's parameters, by name within the block."""
        stored = {name: self._converted(name, value) for name, value in raw.items()}
        made: dict[str, torch.Tensor] = {}
        for part in self._parts[index]:
            made |= self._conversion.parameters(part, stored)
        return {name.removeprefix(self._block_names[index]): value for name, value in made.items()}

    def _checked_parts(self, index: int) -> list[Part]:
        parts = self._conversion.parts(self._checkpoint.blocks[index])
        if all(part.rule is None for part in parts):  # what a rule makes is known when it is applied
            made = {part.target.removeprefix(self._block_names[index]) for part in parts}
            lacking = sorted({name for name, _ in self._blocks[index].named_parameters()} - made)
            if lacking:
                raise ShortstackError(
                    f"{self._checkpoint.source}: block {index} lacks {lacking[0]!r} ({len(lacking)} parameters)",
                    hint="download the checkpoint again",
                )
        return parts

    def _converted(self, name: str, raw: torch.Tensor) -> torch.Tensor:
        dtype = self._computed(raw.dtype)
        if raw.dtype == dtype:
            return raw
        # One more reusable set of tensors: all blocks have the same shapes, by their names within the block.
        key = f"{self._within_block(name)}{tuple(raw.shape)}"
        if key not in self._targets:
            self._targets[key] = torch.empty(raw.shape, dtype=dtype)
        return self._targets[key].copy_(raw)


@dataclass(frozen=True)
class Arrived:
    """A block's stored tensors, where they are computed with.

    Attributes:
        tensors: by their names in the checkpoint.
        ready: when they are; None where they are now.
    """

    tensors: dict[str, torch.Tensor]
    ready: torch.cuda.Event | None = None

    def wait(self) -> dict[str, torch.Tensor]:
        """The tensors, for work that is queued from now on."""
        if self.ready is not None:
            torch.cuda.current_stream(next(iter(self.tensors.values())).device).wait_event(self.ready)
        return self.tensors


class Transfer:
    """Copies one block's raw tensors after another to a CUDA device, in the precision computed in.

    Two sets of device tensors take turns. The copying stream waits for the computation that last used a set, the computing
    stream for the copy that fills one; the host waits for neither, only for pinned memory that it is to fill again.

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


def load_outside_blocks(
    model: nn.Module,
    conversion: Conversion,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device,
    blocks_name: str,
    lent: Mapping[str, torch.Tensor],
) -> None:
    """Load embeddings, final norm and head into a model whose parameters are on the meta device.

    Args:
        lent: tensors that need not be read, by name in the model.

    Raises:
        ShortstackError: a parameter outside the blocks is in no file.
    """
    files = OpenFiles()
    tensors = [t for t in checkpoint.outside_blocks if not checkpoint.is_repeated_head(t.name)]
    by_name = {tensor.name: tensor for tensor in tensors}
    try:
        for part in conversion.parts(tensors):
            if part.target in lent:
                _set(model, part.target, lent[part.target].detach())
                continue
            sources = [by_name[name] for name, _ in part.sources]
            raw = Buffer(files.buffer_bytes(sources)).fill(sources, files)
            stored = {
                name: value.to(device, dtype if value.is_floating_point() else value.dtype)
                for name, value in raw.items()
            }
            for name, value in conversion.parameters(part, stored).items():
                _set(model, name, value)
    finally:
        files.close()
    if checkpoint.tied:
        model.tie_weights()  # type: ignore[operator]
    left = [n for n, p in model.named_parameters() if p.is_meta and not n.startswith(blocks_name + ".")]
    if left:
        raise ShortstackError(
            f"{checkpoint.source}: the weights lack {left[0]!r} ({len(left)} tensors outside the blocks)",
            hint="download the checkpoint again",
        )
    for name, buffer in list(model.named_buffers()):
        if buffer.device != device and not buffer.is_meta:  # those that come with blocks
            _set(model, name, buffer.to(device))


def _assign(block: nn.Module, tensors: dict[str, torch.Tensor], gradients: bool) -> None:
    for name, value in tensors.items():
        _set(block, name, value, gradients and value.is_floating_point())


def _release(block: nn.Module) -> None:
    for name, parameter in list(block.named_parameters()):
        _set(block, name, torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"))


def _set(module: nn.Module, name: str, value: torch.Tensor, gradients: bool = False) -> None:
    owner, _, last = name.rpartition(".")
    holder = module.get_submodule(owner)
    is_parameter = last in dict(holder.named_parameters(recurse=False, remove_duplicate=False))
    setattr(holder, last, nn.Parameter(value, requires_grad=gradients) if is_parameter else value)
