"""The backward sweep, for gradients of weights or of gates on the blocks.

The forward sweep keeps what the base stream brings to each block; from the last block to the first, the block's forward
is computed again with gradients, so that one block and N activations are held, never the model. Where memory allows
it, the forward sweep keeps what autograd needs of blocks too, and nothing is computed again.

A gate on a block multiplies what the block adds to its hidden states; all gates are 1. The gradient of the loss over the
gates comes from the same two sweeps: at a block it is the product of what its output's gradient is and what the block adds.
Weights need no gradients.

Legend: W windows, T tokens, D hidden size; of gates S settings, N blocks, R rows (windows of settings).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from shortstack.engine.block_model import Skeleton
from shortstack.engine.block_weights import BlockWeights
from shortstack.engine.forward import embedded, finished
from shortstack.engine.interface import ForwardResult, GateSetting, GradientRequest, Windows
from shortstack.engine.journal import UNSAVED, Journal
from shortstack.engine.losses import gradient_of
from shortstack.runtime.devices import exact_place

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
        windows: what is swept.
        limit_bytes: the most that they may take.
        first: the first block whose graph is kept, where that is known beforehand.
        last: the block where the backward sweep ends.
    """

    def __init__(self, windows: Windows, *, limit_bytes: int = 0, first: int | None = None, last: int = 0) -> None:
        self._windows = windows
        self._limit = limit_bytes
        self._first = first
        self._last = last
        self._kept: dict[int, KeptBlock] = {}

    def through(
        self, skeleton: Skeleton, block: nn.Module, index: int, given_WTD: torch.Tensor, into_WTD: torch.Tensor
    ) -> bool:
        """Run a block with gradients and keep its graph; False, with nothing done, where it does not fit."""
        if index < self._last or (self._first is not None and index < self._first):
            return False
        kept = KeptBlock(dict(block.named_parameters()), [])
        batches = _forwards(skeleton, block, index, given_WTD, self._windows, onwards=index > self._last)
        if self._first is None:
            forward, taken = _measured(lambda: next(batches), kept.parameters)
            count = sum(map(len, batches_of(skeleton, self._windows)))
            self._first = max(index, len(skeleton.blocks) - self._limit // max(1, taken * count))
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


def batches_of(skeleton: Skeleton, windows: Windows) -> list[list[slice]]:
    """Of each part, as many of its windows at a time as go through a block."""
    return [skeleton.batches(windows.ids_WT, part) for part in windows.parts or [slice(0, len(windows))]]


def _forwards(
    skeleton: Skeleton,
    block: nn.Module,
    index: int,
    given_WTD: torch.Tensor,
    windows: Windows,
    *,
    onwards: bool,
) -> Iterator[Forward]:
    """A block's forward with gradients, some windows at a time.

    Args:
        onwards: the gradient of what goes in is wanted too, for the block before.
    """
    for batch in itertools.chain.from_iterable(batches_of(skeleton, windows)):
        hidden = given_WTD[batch].detach().requires_grad_(onwards)
        call = skeleton.calls(windows.ids_WT[batch])[index]
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


def backward_sweep(
    weights: BlockWeights,
    windows: Windows,
    forward: ForwardResult,
    request: GradientRequest,
    journal: Journal = UNSAVED,
    *,
    last: int = 0,
) -> None:
    """Gradients of every block's weights, block by block from the last to the first.

    Args:
        forward: a forward sweep of the same windows with `keep_inputs`.
        journal: where the state is saved, and where an earlier run's state is.
        last: the block where it ends.
    """
    skeleton, inputs, last_WTD = weights.skeleton, forward.inputs, forward.last_WTD
    if inputs is None or last_WTD is None:
        raise ValueError("the forward sweep must keep its inputs")
    saved = journal.found()
    place = saved.record.get("backward") if saved is not None else None
    start = len(skeleton.blocks) - 1
    if saved is not None and place is not None and place["turn"] >= request.turn:
        if place["turn"] > request.turn or place["next"] < last:
            return  # done by the earlier run
        gradient_WTD, start = saved.tensors["gradient"].to(last_WTD.device), place["next"]
    else:
        gradient_WTD = skeleton.head.nll_gradient(last_WTD, windows.ids_WT, request.loss_scale_W, windows.counted_WT)
    forward_state, forward_record = finished(forward)
    for index, named, computed in _blocks_from_the_last(weights, windows, forward, range(start, last - 1, -1)):
        following = iter(computed)
        for of_part in batches_of(skeleton, windows):
            for batch in of_part:
                hidden, result = next(following)
                torch.autograd.backward(result, gradient_WTD[batch])
                if index > last:
                    gradient_WTD[batch] = gradient_of(hidden)
                del hidden, result
            gradients = _taken_gradients(named)
            request.on_gradients(index, {name: parameter.detach() for name, parameter in named.items()}, gradients)
            del gradients
        del named, computed, following  # before the next block's take their place, not after
        if request.release_inputs:
            inputs[index] = forward_state[f"inputs.{index:05d}"] = torch.empty(0)
        request.on_progress(3)
        if journal.due() or index == last:
            where = {**forward_record, "backward": {"turn": request.turn, "next": index - 1}}
            journal.save({**forward_state, "gradient": gradient_WTD}, where)


def _taken_gradients(named: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """What a backward left for parameters, by name. It is taken from them: whoever has it may let it go one by one."""
    found = {name: parameter.grad for name, parameter in named.items() if parameter.grad is not None}
    for parameter in named.values():
        parameter.grad = None
    return found


def _blocks_from_the_last(
    weights: BlockWeights, windows: Windows, forward: ForwardResult, order: Sequence[int]
) -> Iterator[tuple[int, dict[str, nn.Parameter], Iterable[Forward]]]:
    """(block, its weights, per batch of windows what went in and what came out): kept where it was, else computed again."""
    kept, inputs = 0, forward.inputs or []
    for index in order:
        known = forward.graphs.take(index) if forward.graphs is not None else None
        if known is None:
            break
        kept += 1
        yield index, known.parameters, known.parts
    for index, block in weights.each(order[kept:], gradients=True):
        batches = _forwards(weights.skeleton, block, index, inputs[index], windows, onwards=index > order[-1])
        yield index, dict(block.named_parameters()), batches


def gate_gradients(
    weights: BlockWeights, windows: Windows, settings: Sequence[GateSetting], scale_W: torch.Tensor
) -> torch.Tensor:
    """d (sum over windows of scale * the window's summed NLL) / d gates, at each setting, [S, N], float64, on the CPU.

    Below the lowest gate that any setting changes nothing is computed, and zeros are given: a second derivative is the same
    in both orders.

    Args:
        settings: the gates that are not 1.
        scale_W: of each window.
    """
    skeleton, rows = weights.skeleton, windows.repeated(len(settings))
    depth, count, ids_WT, ids_RT = len(skeleton.blocks), len(settings), windows.ids_WT, rows.ids_WT
    first = min((min(setting) if setting else 0 for setting in settings), default=0)
    gates_NR = _gates(settings, depth, len(windows)).to(ids_WT.device, skeleton.dtype)
    hidden_RTD, inputs = embedded(skeleton, ids_WT), []
    for index, block in weights.each(range(depth)):
        if index == first:
            hidden_RTD = hidden_RTD.repeat(count, *[1] * (hidden_RTD.ndim - 1))
        if index >= first:
            inputs.append(hidden_RTD)
        hidden_RTD = _through(skeleton, block, index, hidden_RTD, ids_WT if index < first else ids_RT, gates_NR[index])
    with torch.enable_grad():
        gradient_RTD = skeleton.head.nll_gradient(hidden_RTD, ids_RT, scale_W.repeat(count), rows.counted_WT)
    found_NR = torch.zeros(depth, len(ids_RT), dtype=torch.float64)
    for index, block in weights.each(range(depth - 1, first - 1, -1)):
        computed = _forwards(skeleton, block, index, inputs[index - first], rows, onwards=index > first)
        for part, (given, result) in zip(skeleton.batches(ids_RT), computed, strict=True):
            gradient, gate = gradient_RTD[part], _wide(gates_NR[index, part], given)
            sums_N = (gradient * (result.detach() - given.detach())).flatten(1).sum(dim=1)
            found_NR[index, part] = exact_place(sums_N).double().cpu()
            if index > first:
                torch.autograd.backward(result, gradient * gate)
                gradient_RTD[part] = gradient_of(given) + gradient * (1 - gate)
        inputs[index - first] = torch.empty(0)
    return found_NR.view(depth, count, -1).sum(dim=-1).T


def _gates(settings: Sequence[GateSetting], depth: int, windows: int) -> torch.Tensor:
    """[N, R]: those of every window of every setting."""
    gates_NSW = torch.ones(depth, len(settings), windows)
    for number, setting in enumerate(settings):
        for place, gate in setting.items():
            gates_NSW[place, number] = gate
    return gates_NSW.flatten(1)


def _through(
    skeleton: Skeleton,
    block: nn.Module,
    index: int,
    hidden_RTD: torch.Tensor,
    ids_RT: torch.Tensor,
    gates_R: torch.Tensor,
) -> torch.Tensor:
    """The output of a block; before settings differ the gates are those of the first windows, which are 1."""
    following_RTD = torch.empty_like(hidden_RTD)
    for part in skeleton.batches(ids_RT):
        given = hidden_RTD[part]
        update = skeleton.run_block(block, given, skeleton.calls(ids_RT[part])[index]) - given
        following_RTD[part] = given + _wide(gates_R[part], given) * update
    return following_RTD


def _wide(gates_R: torch.Tensor, hidden_RTD: torch.Tensor) -> torch.Tensor:
    return gates_R.view(-1, *[1] * (hidden_RTD.ndim - 1))
