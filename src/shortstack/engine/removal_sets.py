"""Losses of the model without each of many sets of blocks, in one sweep.

At a block, sets that have the same blocks below it share one stream: what goes in is computed once for all of them. A set
begins a stream of its own at the first block where it differs, as a copy of what goes into that block. So all sets that
add one block to a common one cost half of what they cost one by one, and nested sets share their beginnings.

Legend: S streams, W windows, T tokens, D hidden size, R rows (windows of streams).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import nn

from shortstack.engine.block_model import Skeleton
from shortstack.engine.block_weights import BlockWeights
from shortstack.engine.cpu import SideBySide
from shortstack.engine.forward import Part, embedded, in_parts, window_nll
from shortstack.engine.interface import OnProgress, RemovalSet, Windows


def streams_at(sets: Collection[RemovalSet], depth: int) -> list[int]:
    """How many streams are run through each block: one for each different beginning among sets that keep the block."""
    return [len({_below(removed, index) for removed in sets if index not in removed}) for index in range(depth)]


def groups_that_fit(sets: Collection[RemovalSet], most: int) -> Iterator[list[RemovalSet]]:
    """Sets in groups of at most `most`, those with the same beginning together."""
    ordered = sorted(set(sets), key=sorted)
    for start in range(0, len(ordered), most):
        yield ordered[start : start + most]


def nll_without(
    weights: BlockWeights,
    windows: Windows,
    sets: Sequence[RemovalSet],
    side_by_side: SideBySide,
    on_progress: OnProgress,
) -> torch.Tensor:
    """Mean NLL per predicted token of each window without each set of blocks, [S, W], float64, on the CPU.

    Args:
        sets: positions of the blocks to bypass; the empty set is the dense model. They are different.
        side_by_side: runs batches.
        on_progress: called with the number of block evaluations (one stream through one block) just done.
    """
    skeleton = weights.skeleton
    base_WTD = embedded(skeleton, windows.ids_WT)
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
        _through_block(skeleton, side_by_side, block, index, streams_SWTD, running, windows.ids_WT)
        on_progress(len(running))
    nll_SW = window_nll(skeleton, streams_SWTD, windows)
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

    def run(part: Part) -> None:
        rows_R = going_R[part.start : part.stop]
        rows_RTD[rows_R] = skeleton.run_block(block, rows_RTD[rows_R], part.call)

    def parts_of(start: int, stop: int) -> list[Part]:
        at_once = skeleton.rows_side_by_side(ids_WT, stop - start)
        ends = [(first, min(first + at_once, stop)) for first in range(start, stop, at_once)]
        return [Part(first, end, skeleton.calls(ids_WT[going_R[first:end] % windows])[index]) for first, end in ends]

    in_parts(skeleton, side_by_side, run, parts_of, len(going_R), ids_WT.shape[1])


def _below(removed: RemovalSet, index: int) -> RemovalSet:
    return frozenset(block for block in removed if block < index)
