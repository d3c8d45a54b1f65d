"""Hidden states of given batches on their way through a model whose blocks come in one at a time.

A sweep runs windows of one length; here are batches of any shape, with padding and positions of their own, one after the
other. Their states stay in memory or lie in a file.

Legend: B rows, T tokens, D hidden size.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from shortstack.checkpoint.headers import read_exactly
from shortstack.checkpoint.reader import Checkpoint
from shortstack.engine.block_model import NotSeparableError, Skeleton
from shortstack.engine.block_weights import BlockWeights
from shortstack.engine.stand_ins import BlockCall
from shortstack.engine.storage import bytes_of
from shortstack.errors import ShortstackError, system_reason
from shortstack.runtime.memory import return_free_memory

Batch = dict[str, Any]
_GIVEN = ("attention_mask", "position_ids")


class BatchStates:
    """One tensor [B, T, D] per batch.

    Args:
        shapes: (B, T) of each batch.
        width: D.
        dtype: of the numbers.
        file: where they lie; None keeps them in memory.

    Raises:
        ShortstackError: the file cannot be made, or there is no room for it.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], width: int, dtype: torch.dtype, file: Path | None) -> None:
        self._shapes = [(rows, tokens, width) for rows, tokens in shapes]
        self._dtype = dtype
        self._file = file
        self._held: dict[int, torch.Tensor] = {}
        sizes = [rows * tokens * width * dtype.itemsize for rows, tokens in shapes]
        self._starts = list(itertools.accumulate(sizes, initial=0))
        if file is not None:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                self._descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            except OSError as error:
                raise self._unwritable(error) from None

    def __getitem__(self, number: int) -> torch.Tensor:
        if self._file is None:
            return self._held[number]
        found = torch.empty(self._shapes[number], dtype=self._dtype)
        read_exactly(self._descriptor, bytes_of(found), self._starts[number], self._file)
        return found

    def __setitem__(self, number: int, states_BTD: torch.Tensor) -> None:
        states_BTD = states_BTD.detach().to("cpu", self._dtype).contiguous()
        if self._file is None:
            self._held[number] = states_BTD
            return
        raw, done = bytes_of(states_BTD), 0
        try:
            while done < len(raw):
                done += os.pwrite(self._descriptor, raw[done:], self._starts[number] + done)
        except OSError as error:
            raise self._unwritable(error) from None

    def copy_from(self, other: BatchStates) -> None:
        """Take the states of others of the same shapes."""
        for number in range(len(self._shapes)):
            self[number] = other[number]

    def close(self) -> None:
        """Let them go; their file is removed."""
        self._held.clear()
        if self._file is not None:
            os.close(self._descriptor)
            self._file.unlink(missing_ok=True)

    def _unwritable(self, error: OSError) -> ShortstackError:
        return ShortstackError(
            f"{self._file}: hidden states could not be written ({system_reason(error)})",
            hint="free some disk space, then run the same command again, which resumes; or use fewer tokens",
        )


class BatchModel:
    """A model whose blocks come in one at a time, each over all batches.

    Args:
        checkpoint: its weights.
        dtype, device: what it is computed in and on.
        trust_remote_code: run code that comes with the checkpoint.
        like: another one, which lends it the tensors outside the blocks that are the same.

    Raises:
        NotSeparableError: its blocks cannot be run one at a time.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype,
        device: torch.device,
        trust_remote_code: bool = False,
        like: BatchModel | None = None,
    ) -> None:
        if checkpoint.anatomy.family.resident:
            raise NotSeparableError(checkpoint.source, checkpoint.anatomy.family.resident)
        self.checkpoint = checkpoint
        self.skeleton: Skeleton = Skeleton(
            checkpoint,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            like=None if like is None else like.skeleton,
        )
        self.weights = BlockWeights(self.skeleton, resident=False)

    @torch.no_grad()
    def embedded(self, batches: Sequence[Batch], file: Path | None = None) -> BatchStates:
        """What goes into the first block, of every batch."""
        shapes = [(int(batch["input_ids"].shape[0]), int(batch["input_ids"].shape[1])) for batch in batches]
        states: BatchStates | None = None
        for number, batch in enumerate(batches):
            first_BTD = self._first_hidden(batch)
            if states is None:
                states = BatchStates(shapes, first_BTD.shape[-1], self.skeleton.dtype, file)
            states[number] = first_BTD
        return states if states is not None else BatchStates([], 0, self.skeleton.dtype, file)

    def call(self, batch: Batch, index: int) -> BlockCall:
        """What a block is called with for a batch, beside its hidden states."""
        ids_BT, more = self._given(batch)
        if more:
            return self.skeleton.record(ids_BT, **more)[index][1]
        return self.skeleton.calls(ids_BT)[index]

    @torch.no_grad()
    def advance(
        self,
        batches: Sequence[Batch],
        states: BatchStates,
        blocks: Iterable[int],
        on_progress: Callable[[int], object] = lambda _: None,
    ) -> None:
        """Take the states of all batches through these blocks, in place.

        Raises:
            ShortstackError: what a block gives is not finite.
        """
        for index, block in self.weights.each(list(blocks)):
            for number, batch in enumerate(batches):
                hidden_BTD = states[number].to(self.skeleton.device)
                given_BTD = self.skeleton.run_block(block, hidden_BTD, self.call(batch, index))
                if not bool(torch.isfinite(given_BTD).all()):
                    raise self.not_finite(index)
                states[number] = given_BTD
            on_progress(index)

    def not_finite(self, index: int) -> ShortstackError:
        """What there is to say where a block gives NaN or infinity."""
        checkpoint = self.checkpoint
        return ShortstackError(
            f"{checkpoint.source}: block {checkpoint.original_blocks[index]} gives hidden states that are not finite in "
            f"{str(self.skeleton.dtype).removeprefix('torch.')}",
            hint="use --dtype bfloat16 or float32, which have more range than float16; `shortstack check` tests the weights",
        )

    def close(self) -> None:
        """Let files and threads go."""
        self.weights.close()
        return_free_memory()

    def _first_hidden(self, batch: Batch) -> torch.Tensor:
        ids_BT, more = self._given(batch)
        return self.skeleton.record(ids_BT, **more)[0][0]

    def _given(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(token ids, what the model is told beside them): nothing for rows without padding and with the usual positions."""
        device = self.skeleton.device
        ids_BT = batch["input_ids"]
        mask_BT, positions_BT = (batch.get(name) for name in _GIVEN)
        usual_BT = torch.arange(ids_BT.shape[1]).expand(ids_BT.shape)
        is_whole = mask_BT is None or bool(mask_BT.all())
        if is_whole and (positions_BT is None or torch.equal(positions_BT, usual_BT)):
            return ids_BT.to(device), {}
        return ids_BT.to(device), {name: batch[name].to(device) for name in _GIVEN if name in batch}
