"""The forward sweep, with branches.

For ppl: beside the base stream b runs one candidate stream c_j per block j, which skips that block. At block
i, with its weights in memory, b and all c_j with j < i go through it together; c_i begins as what b was before. So all
candidates cost N(N+1)/2 block evaluations instead of N(N-1), every weight is read once, and each weight meets one
large matrix product instead of many small ones.

Legend: W windows, T tokens, D hidden size, S streams.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from shortstack.engine.block_model import Skeleton
from shortstack.engine.block_weights import BlockWeights
from shortstack.engine.cpu import SideBySide
from shortstack.engine.journal import Journal, SavedState
from shortstack.engine.stand_ins import BlockCall
from shortstack.runtime.devices import exact_place
from shortstack.runtime.memory import is_out_of_memory, return_free_memory

if TYPE_CHECKING:
    from shortstack.engine.backward import Graphs

# Called with (block index, its weights by name) in a forward sweep.
OnWeights = Callable[[int, dict[str, torch.Tensor]], None]
# Called with (block index, its weights by name, which windows, what goes into it, what comes out of it) of the dense model.
OnHidden = Callable[[int, dict[str, torch.Tensor], slice, torch.Tensor, torch.Tensor], None]
# Called with (index of the block skipped, which windows, which of their tokens, dense logits, logits without the block).
OnLogits = Callable[[int, slice, slice, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True)
class Hooks:
    """What a forward sweep calls with what it has; None where that is not wanted.

    Attributes:
        on_weights: once per block.
        on_hidden: once per block that is scored and some windows.
        on_logits: once per block that is scored and slice of tokens, with branches.
    """

    on_weights: OnWeights | None = None
    on_hidden: OnHidden | None = None
    on_logits: OnLogits | None = None


@dataclass(frozen=True)
class ForwardResult:
    """What a forward sweep found.

    Attributes:
        base_nll_W: mean NLL per predicted token of each window, dense model, float64.
        candidate_nll_NW: the same without each block; None without branches.
        inputs: what the base stream brought to each block, [N][W, T, D]; None where it was not kept.
        last_WTD: the base stream after the last block; None where inputs were not kept.
        graphs: what autograd kept of the base stream's way through blocks, where it was to be kept.
    """

    base_nll_W: torch.Tensor | None
    candidate_nll_NW: torch.Tensor | None
    inputs: list[torch.Tensor] | None
    last_WTD: torch.Tensor | None
    graphs: Graphs | None = None


def finished(forward: ForwardResult) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A finished forward sweep, as its state is saved."""
    inputs = forward.inputs or []
    state = ForwardState(torch.empty(0), inputs, first=len(inputs), next=len(inputs))
    state.base_nll, state.last_WTD = forward.base_nll_W, forward.last_WTD
    state.candidates = list(forward.candidate_nll_NW) if forward.candidate_nll_NW is not None else []
    return state.saved()


@dataclass
class ForwardState:
    """Where a forward sweep is: in the group of candidates from `first` on, before block `next`."""

    base_WTD: torch.Tensor  # what goes into block `first`; once in the streams, the first of them
    inputs: list[torch.Tensor] | None
    first: int = 0
    next: int = 0
    active: int = 0  # candidates so far in this group; the base stream lies behind them
    streams_SWTD: torch.Tensor | None = None
    next_base_WTD: torch.Tensor | None = None
    candidates: list[torch.Tensor] = field(default_factory=list)
    base_nll: torch.Tensor | None = None
    last_WTD: torch.Tensor | None = None

    def saved(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """For the journal."""
        if self.streams_SWTD is not None and self.next > self.first:
            tensors = {"streams": self.streams_SWTD[: self.active + 1]}
        else:
            tensors = {"base": self.base_WTD}
        tensors |= {f"inputs.{index:05d}": tensor for index, tensor in enumerate(self.inputs or [])}
        tensors |= {f"candidates.{index:05d}": tensor for index, tensor in enumerate(self.candidates)}
        optional = {"next_base": self.next_base_WTD, "base_nll": self.base_nll, "last": self.last_WTD}
        tensors |= {name: tensor for name, tensor in optional.items() if tensor is not None}
        record = {"phase": "forward", "first": self.first, "next": self.next, "active": self.active}
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
            base_WTD=tensors["base"] if "base" in tensors else tensors["streams"][0],
            inputs=numbered["inputs"] if saved.record["keeps_inputs"] else None,
            first=saved.record["first"],
            next=saved.record["next"],
            active=saved.record["active"],
            streams_SWTD=tensors.get("streams"),
            next_base_WTD=tensors.get("next_base"),
            candidates=[tensor.cpu() for tensor in numbered["candidates"]],
            base_nll=tensors["base_nll"].cpu() if "base_nll" in tensors else None,
            last_WTD=tensors.get("last"),
        )


@dataclass(frozen=True)
class Group:
    """Candidates that are swept together.

    Attributes:
        members: the blocks that they skip.
        following: the block where the next group begins.
        graphs: where to keep what a backward sweep needs.
        side_by_side: runs batches.
        hooks: called with what is there at a block.
        watched: the blocks whose hidden states are shown: in the first group alone, which the base stream goes all through.
    """

    members: Sequence[int]
    following: int
    graphs: Graphs | None
    side_by_side: SideBySide
    hooks: Hooks
    watched: Sequence[int]


def sweep_group(
    skeleton: Skeleton,
    weights: BlockWeights,
    ids_WT: torch.Tensor,
    state: ForwardState,
    group: Group,
    on_progress: Callable[[int], object],
    journal: Journal,
) -> None:
    """A group's candidates, from block `state.next` to the last."""
    depth, first = len(skeleton.blocks), state.first
    is_first = state.base_nll is None
    # The base stream lies behind the candidates: after block i its output goes one place up, and what stays in its
    # place is what block i was given, which is the candidate that skips block i. Nothing is ever copied.
    streams_SWTD = state.base_WTD.new_empty((len(group.members) + 1, *state.base_WTD.shape))
    if state.streams_SWTD is not None and state.next > first:
        streams_SWTD[: state.active + 1] = state.streams_SWTD
    else:
        streams_SWTD[0] = state.base_WTD
    state.streams_SWTD = streams_SWTD
    state.base_WTD = streams_SWTD[0]  # what it held is among the streams: not held twice
    for index, block in weights.each(range(state.next, depth), gradients=group.graphs is not None):
        if is_first and state.inputs is not None:
            state.inputs.append(streams_SWTD[state.active].clone())
        if index == group.following:
            state.next_base_WTD = streams_SWTD[state.active].clone()  # where the next group begins
        if is_first and group.hooks.on_weights is not None:
            group.hooks.on_weights(index, dict(block.named_parameters()))
        branching = index in group.members
        given_WTD = _watched_input(index, state, group, streams_SWTD, branching)
        if not _kept_graph(skeleton, block, index, state, group, ids_WT):
            _through_block(skeleton, group.side_by_side, block, index, streams_SWTD, state.active, ids_WT, branching)
        if given_WTD is not None and group.hooks.on_hidden is not None:
            left_WTD = streams_SWTD[state.active + branching]
            group.hooks.on_hidden(index, dict(block.named_parameters()), slice(0, len(ids_WT)), given_WTD, left_WTD)
        on_progress(state.active + 1)
        state.active += branching
        state.next = index + 1
        if journal.due():
            journal.save(*state.saved())


def _watched_input(
    index: int, state: ForwardState, group: Group, streams_SWTD: torch.Tensor, branching: bool
) -> torch.Tensor | None:
    """What the base stream brings to a block whose hidden states are shown, where it stays while the block is run."""
    if group.hooks.on_hidden is None or index not in group.watched:
        return None
    if state.inputs is not None:
        return state.inputs[-1]
    return streams_SWTD[state.active] if branching else streams_SWTD[state.active].clone()


def _kept_graph(
    skeleton: Skeleton, block: nn.Module, index: int, state: ForwardState, group: Group, ids_WT: torch.Tensor
) -> bool:
    """Run the base stream alone through a block and keep its graph; False, with nothing done, where that is not wanted."""
    if group.graphs is None or not state.inputs or state.streams_SWTD is None:
        return False
    return group.graphs.through(skeleton, block, index, state.inputs[-1], state.streams_SWTD[0], ids_WT)


def losses_of_group(skeleton: Skeleton, ids_WT: torch.Tensor, state: ForwardState, group: Group) -> None:
    """What the streams that came through the last block say; the next group takes over."""
    streams_SWTD = state.streams_SWTD
    assert streams_SWTD is not None
    if state.base_nll is None and state.inputs is not None:
        state.last_WTD = streams_SWTD[state.active].clone()
    if state.base_nll is None and (group.members or state.inputs is None):  # before a backward sweep alone: no losses
        state.base_nll = _window_nll(skeleton, streams_SWTD[state.active :][:1], ids_WT)[0]
    if state.active:
        state.candidates += list(_window_nll(skeleton, streams_SWTD[: state.active], ids_WT))
        if group.hooks.on_logits is not None:
            _show_logits(skeleton, streams_SWTD, ids_WT, group.members, group.hooks.on_logits)
    state.streams_SWTD = None
    if state.next_base_WTD is not None:
        state.base_WTD, state.next_base_WTD = state.next_base_WTD, None


def _show_logits(
    skeleton: Skeleton, streams_SWTD: torch.Tensor, ids_WT: torch.Tensor, members: Sequence[int], on_logits: OnLogits
) -> None:
    """Logits of the base stream, which lies behind the candidates, and of each candidate, of the same tokens."""
    dense_WTD = streams_SWTD[len(members)]
    for windows, tokens in skeleton.logit_slices(ids_WT):
        ids_BT = ids_WT[windows, tokens]
        dense_BTV = skeleton.logits(dense_WTD[windows, tokens], ids_BT)
        for place, index in enumerate(members):
            on_logits(index, windows, tokens, dense_BTV, skeleton.logits(streams_SWTD[place][windows, tokens], ids_BT))
    return_free_memory()


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


def _through_block(
    skeleton: Skeleton,
    side_by_side: SideBySide,
    block: nn.Module,
    index: int,
    streams_SWTD: torch.Tensor,
    active: int,
    ids_WT: torch.Tensor,
    branching: bool,
) -> None:
    """Candidates 0 to active-1 in place; the base stream from place `active` to the next one up when it branches."""
    windows = len(ids_WT)
    rows_RTD = streams_SWTD.flatten(0, 1)
    base_start = active * windows
    shift = windows if branching else 0

    def run(part: _Part) -> bool:
        """Whether memory was enough; where not, nothing of the part has been written."""
        try:
            result = skeleton.run_block(block, rows_RTD[part.start : part.stop], part.call)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False
        split = min(max(base_start - part.start, 0), part.stop - part.start)
        rows_RTD[part.start : part.start + split] = result[:split]
        rows_RTD[part.start + split + shift : part.stop + shift] = result[split:]
        return True

    left = [(0, (active + 1) * windows)]
    while left:
        parts = [part for start, stop in left for part in _parts(skeleton, index, ids_WT, start, stop)]
        fitted = list(side_by_side(run, parts))
        left = [(part.start, part.stop) for part, fits in zip(parts, fitted, strict=True) if not fits]
        if left and not skeleton.with_fewer_tokens(ids_WT.shape[1]):
            raise torch.OutOfMemoryError(f"{ids_WT.shape[1]} tokens, one window, do not fit")


@dataclass(frozen=True)
class _Part:
    """Windows of streams, as rows, that go through a block together."""

    start: int
    stop: int
    call: BlockCall


def _parts(skeleton: Skeleton, index: int, ids_WT: torch.Tensor, start: int, stop: int) -> list[_Part]:
    """Rows `start` to `stop` in parts: several whole streams together, or one stream, or a part of one."""
    windows, rows = len(ids_WT), skeleton.rows_side_by_side(ids_WT, stop - start)
    parts = []
    while start < stop:
        ends = (start // windows + 1) * windows  # of this stream
        whole = rows >= windows and start % windows == 0
        limit = min(stop, start + rows // windows * windows) if whole else min(stop, ends, start + rows)
        first, repeats = start % windows, -(-(limit - start) // windows)
        ids = ids_WT.repeat(repeats, 1) if repeats > 1 else ids_WT[first : first + limit - start]
        parts.append(_Part(start, limit, skeleton.calls(ids)[index]))
        start = limit
    return parts


def _window_nll(skeleton: Skeleton, streams_SWTD: torch.Tensor, ids_WT: torch.Tensor) -> torch.Tensor:
    """Mean NLL per predicted token, [S, W], float64, on the CPU."""
    streams = len(streams_SWTD)
    nll_RT = skeleton.nll(streams_SWTD.flatten(0, 1), ids_WT.repeat(streams, 1))
    return_free_memory()
    return exact_place(nll_RT).double().mean(dim=1).view(streams, -1).cpu()


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


def windows_tensor(windows: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Windows of token ids as a tensor, [W, T]."""
    return torch.tensor([list(window) for window in windows], dtype=torch.long, device=device)
