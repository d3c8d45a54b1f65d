"""The teacher whose logits are cached: whole in memory, or one block at a time over the batches of a shard.

Legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.formatting import size
from shortstack.data.collators import Batch
from shortstack.engine.block_model import NotSeparableError
from shortstack.engine.load import load_model
from shortstack.errors import ShortstackError
from shortstack.retraining.batch_states import BatchModel
from shortstack.retraining.losses import logits_of
from shortstack.retraining.options import TeachOptions
from shortstack.runtime.devices import pick_device, pick_dtype
from shortstack.runtime.memory import available_bytes

_WHOLE_SHARE = 0.8  # of the free memory: what the weights of a teacher that is held whole may take


class Teacher(Protocol):
    """A model that computes logits."""

    @property
    def dtype(self) -> torch.dtype:
        """What it is computed in."""

    @property
    def device(self) -> torch.device:
        """What it is computed on."""

    def logits(self, batches: Sequence[Batch]) -> Iterator[torch.Tensor]:
        """Logits [B, T, V] of one batch after the other."""


@dataclass(frozen=True)
class WholeTeacher:
    """A teacher that is in memory as a whole."""

    model: Any = field(repr=False)
    dtype: torch.dtype
    device: torch.device

    @torch.no_grad()
    def logits(self, batches: Sequence[Batch]) -> Iterator[torch.Tensor]:
        """Logits [B, T, V] of one batch after the other."""
        for batch in batches:
            here = {key: value.to(self.device) for key, value in batch.items() if hasattr(value, "to")}
            yield logits_of(self.model, here)


@dataclass(frozen=True)
class StreamedTeacher:
    """A teacher whose blocks come in one at a time: all of them once for the batches of each call."""

    model: BatchModel = field(repr=False)

    @property
    def dtype(self) -> torch.dtype:
        """What it is computed in."""
        return self.model.skeleton.dtype

    @property
    def device(self) -> torch.device:
        """What it is computed on."""
        return self.model.skeleton.device

    @torch.no_grad()
    def logits(self, batches: Sequence[Batch]) -> Iterator[torch.Tensor]:
        """Logits [B, T, V] of one batch after the other; between them lie the hidden states of all."""
        states = self.model.embedded(batches)
        try:
            self.model.advance(batches, states, range(self.model.checkpoint.depth))
            for number, batch in enumerate(batches):
                yield self.model.skeleton.logits(states[number].to(self.device), batch["input_ids"].to(self.device))
        finally:
            states.close()


@contextlib.contextmanager
def opened_teacher(checkpoint: Checkpoint, options: TeachOptions, say: Callable[[str], object]) -> Iterator[Teacher]:
    """Within, the teacher: whole where it fits, else a block at a time, unless `memory` says which.

    Raises:
        ShortstackError: it does not fit as a whole, and its blocks cannot be run one at a time.
    """
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, checkpoint.tensors[checkpoint.anatomy.embedding].dtype, device)
    needed, free = checkpoint.parameters() * dtype.itemsize, available_bytes(device)
    if options.memory == "streamed" or (options.memory == "auto" and needed > _WHOLE_SHARE * free):
        try:
            model = _blocks(checkpoint, dtype, device, options.trust_remote_code)
        except NotSeparableError as error:
            if options.memory == "streamed":
                raise ShortstackError(
                    f"{checkpoint.source}: --memory streamed, but {error.reason}",
                    hint="leave --memory out; the teacher is then held whole",
                ) from None
            say(f"{checkpoint.source}: the whole teacher is held in memory: {error.reason}")
        else:
            if options.memory == "auto":
                say(f"{checkpoint.source}: {size(needed)} of weights, {size(free)} free: blocks are read one at a time")
            with contextlib.closing(model):
                yield StreamedTeacher(model)
            return
    whole, dtype, device = load_model(
        checkpoint, dtype=options.dtype, device=options.device, trust_remote_code=options.trust_remote_code
    )
    yield WholeTeacher(whole, dtype, device)


def _blocks(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, trust_remote_code: bool) -> BatchModel:
    """The teacher, one block at a time.

    Raises:
        NotSeparableError: its blocks cannot be run so.
    """
    model = BatchModel(checkpoint, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    try:
        model.call({"input_ids": torch.arange(8)[None]}, 0)  # raises where blocks are given what depends on the text
    except BaseException:
        model.close()
        raise
    return model
