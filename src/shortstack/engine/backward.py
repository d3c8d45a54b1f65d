"""The backward sweep, for gradients.

The forward sweep keeps what the base stream brings to each block; from the last block to the first, the block's forward
is computed again with gradients, so that one block and N activations are held, never the model. Where memory allows
it, the forward sweep keeps the graphs of blocks too, and nothing is computed again.

Legend: W windows, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn

from shortstack.engine.block_model import Skeleton, gradient_of
from shortstack.engine.block_weights import BlockWeights
from shortstack.engine.forward import ForwardResult, finished
from shortstack.engine.graphs import Forward, Graphs, forwards
from shortstack.engine.journal import Journal

# Called with (block index, its weights, their gradients).
OnGradients = Callable[[int, dict[str, torch.Tensor], dict[str, torch.Tensor]], None]


def backward_sweep(
    skeleton: Skeleton,
    weights: BlockWeights,
    ids_WT: torch.Tensor,
    forward: ForwardResult,
    *,
    loss_scale_W: torch.Tensor,
    on_gradients: OnGradients,
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
        on_gradients: called once per block.
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
        gradient_WTD = skeleton.nll_gradient(last_WTD, ids_WT, loss_scale_W)
    forward_state, forward_record = finished(forward)
    rows = skeleton.rows_at_a_time(ids_WT)
    order = range(start, last - 1, -1)
    for index, named, parts in _forwards(skeleton, weights, forward.graphs, order, inputs, ids_WT, last):
        for number, (hidden, result) in enumerate(parts):
            part = slice(number * rows, (number + 1) * rows)
            torch.autograd.backward(result, gradient_WTD[part])
            if index > last:
                gradient_WTD[part] = gradient_of(hidden)
        gradients = _taken_gradients(named)
        on_gradients(index, {name: parameter.detach() for name, parameter in named.items()}, gradients)
        del named, parts, hidden, result, gradients  # before the next block's take their place, not after
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
        parts = forwards(skeleton, block, index, inputs[index], ids_WT, onwards=index > last)
        yield index, dict(block.named_parameters()), parts
