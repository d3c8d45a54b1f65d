"""Losses of the model without each of many sets of blocks, in one sweep.

At a block, sets that have the same blocks below it share one stream: what goes in is computed once for all of them. A set
begins a stream of its own at the first block where it differs, as a copy of what goes into that block. So all sets that
add one block to a common one cost half of what they cost one by one, and nested sets share their beginnings.

Legend: S streams, W windows, T tokens, D hidden size, R rows (windows of streams).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import nn

from shortstack.engine.block_model import Skeleton
from shortstack.engine.block_weights import BlockWeights
from shortstack.engine.cpu import SideBySide
from shortstack.engine.forward import embedded
from shortstack.runtime.devices import exact_place
from shortstack.runtime.memory import is_out_of_memory, return_free_memory

RemovalSet = frozenset[int]  # positions of blocks


def streams_at(sets: Collection[RemovalSet], depth: int) -> list[int]:
    """How many streams are run through each block: one for each different beginning among sets that keep the block."""
    return [len({_below(removed, index) for removed in sets if index not in removed}) for index in range(depth)]


def groups_that_fit(sets: Collection[RemovalSet], most: int) -> Iterator[list[RemovalSet]]:
    """Sets in groups of at most `most`, those with the same beginning together."""
    ordered = sorted(set(sets), key=sorted)
    for start in range(0, len(ordered), most):
        yield ordered[start : start + most]


def nll_without(
    skeleton: Skeleton,
    weights: BlockWeights,
    ids_WT: torch.Tensor,
    sets: Sequence[RemovalSet],
    side_by_side: SideBySide,
    on_progress: Callable[[int], object] = lambda _: None,
) -> torch.Tensor:
    """Mean NLL per predicted token of each window without each set of blocks, [len(sets), W], float64, on the CPU.

    Args:
        ids_WT: the windows.
        sets: positions of the blocks to pass over; the empty set is the dense model. They are different.
        side_by_side: runs batches.
        on_progress: called with the number of block evaluations (one stream through one block) just done.
    """
    base_WTD = embedded(skeleton, ids_WT)
    streams_SWTD = base_WTD.new_empty((len(sets), *base_WTD.shape))
    streams_SWTD[0] = base_WTD
    del base_WTD
    shared: list[list[RemovalSet]] = [list(sets)]  # by stream: the sets that it belongs to
    needed = [index for index, streams in enumerate(streams_at(sets, len(skeleton.blocks))) if streams]
    for index, block in weights.each(needed):
        for stream, belonging in enumerate(list(shared)):
            staying = [removed for removed in belonging if index in removed]
            going = [removed for removed in belonging if index not in removed]
            if staying and going:
                streams_SWTD[len(shared)] = streams_SWTD[stream]
                shared[stream] = going
                shared.append(staying)
        running = [stream for stream, belonging in enumerate(shared) if index not in belonging[0]]
        _through_block(skeleton, side_by_side, block, index, streams_SWTD, running, ids_WT)
        on_progress(len(running))
    nll_RT = skeleton.head.nll(streams_SWTD.flatten(0, 1), ids_WT.repeat(len(sets), 1))
    return_free_memory()
    nll_SW = exact_place(nll_RT).double().mean(dim=1).view(len(sets), -1).cpu()
    found = {belonging[0]: nll_W for belonging, nll_W in zip(shared, nll_SW, strict=True)}
    return torch.stack([found[removed] for removed in sets])


def _through_block(
    skeleton: Skeleton,
    side_by_side: SideBySide,
    block: nn.Module,
    index: int,
    streams_SWTD: torch.Tensor,
    running: Sequence[int],
    ids_WT: torch.Tensor,
) -> None:
    """Some of the streams through a block, in place."""
    windows = len(ids_WT)
    rows_RTD = streams_SWTD.flatten(0, 1)
    going_R = torch.cat([torch.arange(windows) + stream * windows for stream in running]).to(ids_WT.device)

    def run(part: slice) -> bool:
        """Whether memory was enough; where not, nothing of the part has been written."""
        rows = going_R[part]
        try:
            rows_RTD[rows] = skeleton.run_block(block, rows_RTD[rows], skeleton.calls(ids_WT[rows % windows])[index])
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    left = [slice(0, len(going_R))]
    while left:
        parts = [part for whole in left for part in _parts(skeleton, ids_WT, whole)]
        for part in parts:  # what a block is called with is found out once per shape, not by several threads at once
            skeleton.calls(ids_WT[going_R[part] % windows])
        fitted = list(side_by_side(run, parts))
        left = [part for part, fits in zip(parts, fitted, strict=True) if not fits]
        if left and not skeleton.with_fewer_tokens(ids_WT.shape[1]):
            raise torch.OutOfMemoryError(f"{ids_WT.shape[1]} tokens, one window, do not fit")


def _parts(skeleton: Skeleton, ids_WT: torch.Tensor, whole: slice) -> Iterator[slice]:
    rows = skeleton.rows_side_by_side(ids_WT, whole.stop - whole.start)
    for start in range(whole.start, whole.stop, rows):
        yield slice(start, min(start + rows, whole.stop))


def _below(removed: RemovalSet, index: int) -> RemovalSet:
    return frozenset(block for block in removed if block < index)
