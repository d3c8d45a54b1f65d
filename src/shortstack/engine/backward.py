"""The backward sweep, for gradients.

The forward sweep keeps what the base stream brings to each block; from the last block to the first, the block's forward
is computed again with gradients, so that one block and N activations are held, never the model. Where memory allows
it, the forward sweep keeps what autograd needs of blocks too, and nothing is computed again.

Legend: W windows, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from shortstack.engine.block_model import Skeleton
from shortstack.engine.block_weights import BlockWeights
from shortstack.engine.forward import ForwardResult, finished
from shortstack.engine.journal import Journal
from shortstack.engine.losses import gradient_of

Parts = Sequence[slice]  # windows whose gradients are wanted apart; they lie side by side, and some may be empty
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
        parts: windows whose gradients are wanted apart.
    """

    def __init__(
        self, limit_bytes: int = 0, *, first: int | None = None, last: int = 0, parts: Parts | None = None
    ) -> None:
        self._limit = limit_bytes
        self._parts = parts
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
        places = [place for part in batches_of(skeleton, ids_WT, self._parts) for place in part]
        batches = forwards(skeleton, block, index, given_WTD, ids_WT, places, onwards=index > self._last)
        if self._first is None:
            forward, taken = _measured(lambda: next(batches), kept.parameters)
            held = self._limit // max(1, taken * len(places))
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


def batches_of(skeleton: Skeleton, ids_WT: torch.Tensor, parts: Parts | None = None) -> list[list[slice]]:
    """Of each part, as many of its windows at a time as go through a block."""
    rows = skeleton.rows_at_a_time(ids_WT)
    return [
        [slice(start, min(start + rows, part.stop)) for start in range(part.start, part.stop, rows)]
        for part in parts or [slice(0, len(ids_WT))]
    ]


def forwards(
    skeleton: Skeleton,
    block: nn.Module,
    index: int,
    given_WTD: torch.Tensor,
    ids_WT: torch.Tensor,
    batches: Sequence[slice],
    *,
    onwards: bool,
) -> Iterator[Forward]:
    """A block's forward with gradients, some windows at a time.

    Args:
        batches: which.
        onwards: the gradient of what goes in is wanted too, for the block before.
    """
    for part in batches:
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


# Called with (block index, its weights, their gradients over a part of the windows), for each part in turn.
OnGradients = Callable[[int, dict[str, torch.Tensor], dict[str, torch.Tensor]], None]


def backward_sweep(
    skeleton: Skeleton,
    weights: BlockWeights,
    ids_WT: torch.Tensor,
    forward: ForwardResult,
    *,
    loss_scale_W: torch.Tensor,
    on_gradients: OnGradients,
    counted_WT: torch.Tensor | None = None,
    parts: Parts | None = None,
    last: int = 0,
    release_inputs: bool = True,
    on_progress: Callable[[int], object] = lambda _: None,
    turn: int = 0,
    journal: Journal | None = None,
) -> None:
    """Gradients of every block's weights, block by block from the last to the first.

    Args:
        forward: a forward sweep of the same windows with `keep_inputs`.
        loss_scale_W: the loss is the sum over windows of this times the window's summed NLL; gradients are complete
            sums over all windows before `on_gradients` sees them.
        on_gradients: called once per block and part.
        counted_WT: which tokens count in a window's NLL; by default all that are predicted.
        parts: windows whose gradients are wanted apart; by default all are summed.
        last: the block where it ends.
        release_inputs: let the forward sweep's inputs go as they are used.
        on_progress: called with the number of block evaluations just done.
        turn: which of several backward sweeps this is; the state names it.
        journal: where the state is saved, and where an earlier run's state is.
    """
    inputs, last_WTD = forward.inputs, forward.last_WTD
    if inputs is None or last_WTD is None:
        raise ValueError("the forward sweep must keep its inputs")
    journal = journal or Journal(None)
    saved = journal.found()
    place = saved.record.get("backward") if saved is not None else None
    start = len(skeleton.blocks) - 1
    if saved is not None and place is not None and place["turn"] >= turn:
        if place["turn"] > turn or place["next"] < last:
            return  # done by the earlier run
        gradient_WTD, start = saved.tensors["gradient"].to(ids_WT.device), place["next"]
    else:
        gradient_WTD = skeleton.head.nll_gradient(last_WTD, ids_WT, loss_scale_W, counted_WT)
    forward_state, forward_record = finished(forward)
    batches = batches_of(skeleton, ids_WT, parts)
    flat = [place for part in batches for place in part]
    order = range(start, last - 1, -1)
    for index, named, computed in _forwards(skeleton, weights, forward.graphs, order, inputs, ids_WT, flat, last):
        following = iter(computed)
        for of_part in batches:
            for place in of_part:
                hidden, result = next(following)
                torch.autograd.backward(result, gradient_WTD[place])
                if index > last:
                    gradient_WTD[place] = gradient_of(hidden)
                del hidden, result
            gradients = _taken_gradients(named)
            on_gradients(index, {name: parameter.detach() for name, parameter in named.items()}, gradients)
            del gradients
        del named, computed, following  # before the next block's take their place, not after
        if release_inputs:
            inputs[index] = forward_state[f"inputs.{index:05d}"] = torch.empty(0)
        on_progress(3)
        if journal.due() or index == last:
            where = {**forward_record, "backward": {"turn": turn, "next": index - 1}}
            journal.save({**forward_state, "gradient": gradient_WTD}, where)


def _taken_gradients(named: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """What a backward left for parameters, by name. It is taken from them: whoever has it may let it go one by one."""
    found = {name: parameter.grad for name, parameter in named.items() if parameter.grad is not None}
    for parameter in named.values():
        parameter.grad = None
    return found


def _forwards(
    skeleton: Skeleton,
    weights: BlockWeights,
    graphs: Graphs | None,
    order: Sequence[int],
    inputs: list[torch.Tensor],
    ids_WT: torch.Tensor,
    batches: Sequence[slice],
    last: int,
) -> Iterator[tuple[int, dict[str, nn.Parameter], Iterable[Forward]]]:
    """(block, its weights, per batch of windows what went in and what came out): kept where it was, else computed again."""
    kept = 0
    for index in order:
        known = graphs.take(index) if graphs is not None else None
        if known is None:
            break
        kept += 1
        yield index, known.parameters, known.parts
    for index, block in weights.each(order[kept:], gradients=True):
        parts = forwards(skeleton, block, index, inputs[index], ids_WT, batches, onwards=index > last)
        yield index, dict(block.named_parameters()), parts
