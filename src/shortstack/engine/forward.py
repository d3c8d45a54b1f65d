"""The forward sweep, with branches.

For ppl: beside the base stream b runs one candidate stream c_j per block j, which skips that block. At block
i, with its weights in memory, b and all c_j with j < i go through it together; c_i begins as what b was before. So all
candidates cost N(N+1)/2 block evaluations instead of N(N-1), every weight is read once, and each weight meets one
large matrix product instead of many small ones.

Legend: W windows, T tokens, D hidden size, S streams.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from shortstack.engine.block_model import Skeleton
from shortstack.engine.cpu import SideBySide
from shortstack.engine.interface import ForwardResult, OnLogits, Windows
from shortstack.engine.journal import SavedState
from shortstack.engine.losses import Predictions, cached_pieces, mean_nll
from shortstack.engine.stand_ins import BlockCall
from shortstack.runtime.memory import is_out_of_memory, return_free_memory


@dataclass
class Streams:
    """Hidden states on their way through the blocks: those of the candidates, and behind them the base stream's.

    After block i the base stream's go one place up, and what stays in its place is what block i was given, which is the
    candidate that skips block i. Nothing is ever copied.

    Attributes:
        held_SWTD: all of them, with places for those to come.
        active: how many candidates there are so far.
        next: the block that they come to next.
    """

    held_SWTD: torch.Tensor
    active: int = 0
    next: int = 0

    @property
    def base(self) -> torch.Tensor:
        """The model's own, [W, T, D]."""
        return self.held_SWTD[self.active]

    @property
    def candidates(self) -> torch.Tensor:
        """Those that have skipped a block, [S, W, T, D]."""
        return self.held_SWTD[: self.active]

    def make_room(self, candidates: int) -> None:
        """Have places for so many candidates and the base stream."""
        held_SWTD = self.held_SWTD.new_empty((candidates + 1, *self.held_SWTD.shape[1:]))
        held_SWTD[: self.active + 1] = self.held_SWTD[: self.active + 1]
        self.held_SWTD = held_SWTD


@dataclass
class ForwardState:
    """How far a forward sweep is: all that a run which was cut off needs to resume.

    Attributes:
        streams: of the group of candidates that is swept.
        inputs: what the base stream brought to each block so far; None where it is not kept.
        first: the block where the group begins.
        next_base_WTD: what goes into the block where the next group begins.
        candidates: the NLL of each window without a block, for each candidate of the groups that are done.
        base_nll, last_WTD: as in `ForwardResult`, once the first group is done.
    """

    streams: Streams
    inputs: list[torch.Tensor] | None
    first: int = 0
    next_base_WTD: torch.Tensor | None = None
    candidates: list[torch.Tensor] = field(default_factory=list)
    base_nll: torch.Tensor | None = None
    last_WTD: torch.Tensor | None = None

    def begin_group(self, first: int) -> None:
        """What is left of a group is where the next one begins."""
        base_WTD = self.next_base_WTD
        held_SWTD = self.streams.held_SWTD.new_empty(0) if base_WTD is None else base_WTD[None]
        self.streams, self.first, self.next_base_WTD = Streams(held_SWTD, next=first), first, None

    def saved(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """For the journal."""
        streams = self.streams
        tensors = {"streams": streams.held_SWTD[: streams.active + 1]}
        tensors |= {f"inputs.{index:05d}": tensor for index, tensor in enumerate(self.inputs or [])}
        tensors |= {f"candidates.{index:05d}": tensor for index, tensor in enumerate(self.candidates)}
        optional = {"next_base": self.next_base_WTD, "base_nll": self.base_nll, "last": self.last_WTD}
        tensors |= {name: tensor for name, tensor in optional.items() if tensor is not None}
        record = {"phase": "forward", "first": self.first, "next": streams.next, "active": streams.active}
        return tensors, {**record, "keeps_inputs": self.inputs is not None}

    @staticmethod
    def restored(saved: SavedState, device: torch.device) -> ForwardState:
        """From the journal. A state of the backward sweep means that this one is done."""
        tensors = {name: tensor.to(device) for name, tensor in saved.tensors.items()}
        numbered = {
            kind: [tensors[name] for name in sorted(tensors) if name.startswith(f"{kind}.")]
            for kind in ("inputs", "candidates")
        }
        return ForwardState(
            Streams(tensors["streams"], saved.record["active"], saved.record["next"]),
            numbered["inputs"] if saved.record["keeps_inputs"] else None,
            saved.record["first"],
            tensors.get("next_base"),
            [tensor.cpu() for tensor in numbered["candidates"]],
            tensors["base_nll"].cpu() if "base_nll" in tensors else None,
            tensors.get("last"),
        )


def finished(forward: ForwardResult) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A finished forward sweep, as its state is saved."""
    depth, candidates = len(forward.inputs or []), forward.candidate_nll_NW
    return ForwardState(
        Streams(torch.empty(0), next=depth),
        forward.inputs or [],
        depth,
        candidates=[] if candidates is None else list(candidates),
        base_nll=forward.base_nll_W,
        last_WTD=forward.last_WTD,
    ).saved()


def embedded(skeleton: Skeleton, ids_WT: torch.Tensor) -> torch.Tensor:
    """What goes into the first block, [W, T, D]."""
    rows = skeleton.rows_at_a_time(ids_WT)
    first_RTD = skeleton.first_hidden(ids_WT[:rows])
    # Put in their place one by one: to join a list would hold all twice, and the list's share is not given back.
    base_WTD = first_RTD.new_empty((len(ids_WT), *first_RTD.shape[1:]))
    base_WTD[:rows] = first_RTD
    for start in range(rows, len(ids_WT), rows):
        base_WTD[start : start + rows] = skeleton.first_hidden(ids_WT[start : start + rows])
    return base_WTD


def shown_nll(
    skeleton: Skeleton,
    streams: Streams,
    windows: Windows,
    members: Sequence[int],
    on_logits: OnLogits,
) -> torch.Tensor:
    """Mean NLL per predicted token of the base stream and of each candidate, [1 + S, W], float64, on the CPU.

    The logits are shown on the way: those of the base stream and of a candidate, of the same tokens.
    """
    ids_WT, counted_WT = windows.ids_WT, windows.counted_WT
    sums_SW = torch.zeros(1 + len(members), len(windows), dtype=torch.float64)

    def add_nll(place: int, some: slice, tokens: slice, predicted: Predictions) -> None:
        following = slice(tokens.start + 1, tokens.stop + 1)
        counted_BT = None if counted_WT is None else counted_WT[some, following]
        sums_SW[place, some] += predicted.summed_nll(ids_WT[some, following], counted_BT)

    for slice_of in skeleton.head.slices(ids_WT):
        ids_BT = ids_WT[slice_of]
        dense_BTV = skeleton.logits(streams.base[slice_of], ids_BT)
        pieces = list(cached_pieces(slice_of, dense_BTV.shape[-1], ids_WT.device))
        dense = Predictions(dense_BTV).of_pieces(slice_of, pieces)
        for piece, of_dense in zip(pieces, dense, strict=True):
            add_nll(0, *piece, of_dense)
        for place, (index, hidden_WTD) in enumerate(zip(members, streams.candidates, strict=True), start=1):
            without = Predictions(skeleton.logits(hidden_WTD[slice_of], ids_BT)).of_pieces(slice_of, pieces)
            for piece, of_dense, of_without in zip(pieces, dense, without, strict=True):
                add_nll(place, *piece, of_without)
                on_logits(index, *piece, of_dense, of_without)
    return_free_memory()
    return sums_SW / (ids_WT.shape[1] - 1 if counted_WT is None else counted_WT[:, 1:].sum(dim=1).cpu())


def through_block(
    skeleton: Skeleton,
    side_by_side: SideBySide,
    streams: Streams,
    ids_WT: torch.Tensor,
    block: nn.Module,
    index: int,
    branching: bool,
) -> None:
    """Candidates in place; the base stream to the next place up when it branches. In smaller batches once memory runs out."""
    windows, active = len(ids_WT), streams.active
    rows_RTD = streams.held_SWTD.flatten(0, 1)
    base_start = active * windows
    shift = windows if branching else 0

    def run(part: Part) -> None:
        result = skeleton.run_block(block, rows_RTD[part.start : part.stop], part.call)
        split = min(max(base_start - part.start, 0), part.stop - part.start)
        rows_RTD[part.start : part.start + split] = result[:split]
        rows_RTD[part.start + split + shift : part.stop + shift] = result[split:]

    parts_of = functools.partial(_parts, skeleton, index, ids_WT)
    in_parts(skeleton, side_by_side, run, parts_of, (active + 1) * windows, ids_WT.shape[1])


def in_parts(
    skeleton: Skeleton,
    side_by_side: SideBySide,
    run: Callable[[Part], None],
    parts_of: Callable[[int, int], list[Part]],
    rows: int,
    seq_len: int,
) -> None:
    """Run all rows in parts, and again in smaller ones what memory was not enough for.

    Args:
        run: takes a part through a block; where memory runs out, nothing of the part has been written.
        parts_of: the parts of the rows from one to another.
        rows: how many there are.
        seq_len: tokens of each.

    Raises:
        torch.OutOfMemoryError: one row does not fit.
    """

    def fits(part: Part) -> bool:
        try:
            run(part)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    left = [(0, rows)]
    while left:
        parts = [part for start, stop in left for part in parts_of(start, stop)]
        fitted = list(side_by_side(fits, parts))
        left = [(part.start, part.stop) for part, enough in zip(parts, fitted, strict=True) if not enough]
        if left and not skeleton.with_fewer_tokens(seq_len):
            raise torch.OutOfMemoryError(f"{seq_len} tokens, one window, do not fit")


@dataclass(frozen=True)
class Part:
    """Windows of streams, as rows, that go through a block together."""

    start: int
    stop: int
    call: BlockCall


def _parts(skeleton: Skeleton, index: int, ids_WT: torch.Tensor, start: int, stop: int) -> list[Part]:
    """Rows `start` to `stop` in parts: several whole streams together, or one stream, or a part of one."""
    windows, rows = len(ids_WT), skeleton.rows_side_by_side(ids_WT, stop - start)
    parts = []
    while start < stop:
        ends = (start // windows + 1) * windows  # of this stream
        whole = rows >= windows and start % windows == 0
        limit = min(stop, start + rows // windows * windows) if whole else min(stop, ends, start + rows)
        first, repeats = start % windows, -(-(limit - start) // windows)
        ids = ids_WT.repeat(repeats, 1) if repeats > 1 else ids_WT[first : first + limit - start]
        parts.append(Part(start, limit, skeleton.calls(ids)[index]))
        start = limit
    return parts


def window_nll(skeleton: Skeleton, streams_SWTD: torch.Tensor, windows: Windows) -> torch.Tensor:
    """Mean NLL per predicted token that counts, [S, W], float64, on the CPU."""
    rows = windows.repeated(len(streams_SWTD))
    nll_RT = skeleton.head.nll(streams_SWTD.flatten(0, 1), rows.ids_WT)
    return mean_nll(nll_RT, rows.counted_WT).view(len(streams_SWTD), -1)


def block_evaluations(depth: int, group: int | None = None, candidates: Sequence[int] | None = None) -> int:
    """Streams through blocks of a forward sweep with branches: N(N+1)/2 for all N candidates together.

    The base stream goes with each group from where it begins, for the first one from the first block.
    """
    total = 0
    for number, members in enumerate(groups_of(range(depth) if candidates is None else candidates, group)):
        total += depth - (members[0] if number else 0) + sum(depth - 1 - member for member in members)
    return total


def groups_of(candidates: Sequence[int], size: int | None) -> list[list[int]]:
    """Candidates that are swept together: `size` at a time, all of them by default."""
    step = size or len(candidates)
    return [list(candidates[start : start + step]) for start in range(0, len(candidates), step)]
