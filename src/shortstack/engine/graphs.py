"""What autograd keeps of blocks' forwards, where it fits: a backward sweep need not compute them again.

Legend: W windows, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from shortstack.engine.block_model import Skeleton

Result = TypeVar("Result")
Forward = tuple[torch.Tensor, torch.Tensor]  # what went into a block, and what came out with its graph


@dataclass(frozen=True)
class KeptBlock:
    """One block's forward with its graph.

    Attributes:
        parameters: the weights that it was computed with, by name within the block.
        parts: one forward per batch of windows.
    """

    parameters: dict[str, nn.Parameter]
    parts: list[Forward]


class Graphs:
    """Keeps the graphs of the last blocks, as many as fit: the first block's forward tells what one takes.

    Args:
        limit_bytes: the most that they may take.
        first: the first block whose graph is kept, where that is known beforehand.
        last: the block where the backward sweep ends.
    """

    def __init__(self, limit_bytes: int = 0, *, first: int | None = None, last: int = 0) -> None:
        self._limit = limit_bytes
        self._first = first
        self._last = last
        self._kept: dict[int, KeptBlock] = {}

    def through(
        self,
        skeleton: Skeleton,
        block: nn.Module,
        index: int,
        given_WTD: torch.Tensor,
        into_WTD: torch.Tensor,
        ids_WT: torch.Tensor,
    ) -> bool:
        """Run a block with gradients and keep its graph; False, with nothing done, where it does not fit."""
        if index < self._last or (self._first is not None and index < self._first):
            return False
        kept = KeptBlock(dict(block.named_parameters()), [])
        batches = forwards(skeleton, block, index, given_WTD, ids_WT, onwards=index > self._last)
        if self._first is None:
            forward, taken = _measured(lambda: next(batches), kept.parameters)
            held = self._limit // max(1, taken * -(-len(ids_WT) // skeleton.rows_at_a_time(ids_WT)))
            self._first = max(index, len(skeleton.blocks) - held)
            if self._first > index:
                return False
            kept.parts.append(forward)
        kept.parts.extend(batches)
        torch.cat([result.detach() for _, result in kept.parts], out=into_WTD)
        self._kept[index] = kept
        return True

    def take(self, index: int) -> KeptBlock | None:
        """A block's forward, which is given away: its graph is gone after one backward."""
        return self._kept.pop(index, None)


def forwards(
    skeleton: Skeleton, block: nn.Module, index: int, given_WTD: torch.Tensor, ids_WT: torch.Tensor, *, onwards: bool
) -> Iterator[Forward]:
    """A block's forward with gradients, as many windows at a time as go through a block.

    Args:
        onwards: the gradient of what goes in is wanted too, for the block before.
    """
    rows = skeleton.rows_at_a_time(ids_WT)
    for start in range(0, len(ids_WT), rows):
        part = slice(start, start + rows)
        hidden = given_WTD[part].detach().requires_grad_(onwards)
        call = skeleton.calls(ids_WT[part])[index]
        with torch.enable_grad():
            result = skeleton.run_block(block, hidden, call)
        yield hidden, result


def _measured(run: Callable[[], Result], parameters: dict[str, nn.Parameter]) -> tuple[Result, int]:
    """(what it gives, bytes that autograd keeps for it, beside the weights)."""
    found = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters.values()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = run()
    return result, sum(found.values())
