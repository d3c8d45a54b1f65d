"""The engine that runs a model one block at a time: skeleton, weights and sweeps together."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from shortstack.checkpoint.reader import Checkpoint
from shortstack.engine.backward import Graphs, OnGradients, Parts, backward_sweep
from shortstack.engine.block_model import NotSeparableError, Skeleton
from shortstack.engine.block_weights import BlockWeights
from shortstack.engine.cpu import workers
from shortstack.engine.forward import (
    ForwardResult,
    ForwardState,
    Hooks,
    OnWeights,
    Streams,
    block_evaluations,
    embedded,
    groups_of,
    shown_nll,
    sweep,
    through_block,
    window_nll,
)
from shortstack.engine.gates import GateSetting, gate_gradients
from shortstack.engine.journal import Journal
from shortstack.engine.removal_sets import RemovalSet, groups_that_fit, nll_without
from shortstack.engine.stopwatch import median_seconds
from shortstack.runtime.memory import installed_bytes, return_free_memory

_NO_HOOKS = Hooks()
# Of the machine's memory: what is larger may not stay in the page cache until it is read again, and is read past it. A
# 7B-shaped checkpoint took 18 to 20 s so, and 30 to 32 s through the cache (docs/experiments.md, 2026-11-26).
_CACHED_SHARE = 0.5


class StreamedModel:
    """Blocks are brought in one after another, or kept once they were read.

    Args:
        skeleton: the model without its blocks' weights.
        resident: keep every block once it was read.
        group: how many candidates are swept together; all of them by default.
        candidates: the blocks to score, by position, ascending; all by default.
        graph_bytes: what may be kept of a forward sweep that only a backward sweep needs.
    """

    reason = ""

    def __init__(
        self,
        skeleton: Skeleton,
        *,
        resident: bool,
        group: int | None = None,
        candidates: Sequence[int] | None = None,
        graph_bytes: int = 0,
    ) -> None:
        self._graph_bytes = graph_bytes
        self.candidates = tuple(range(len(skeleton.blocks)) if candidates is None else candidates)
        self.skeleton = skeleton
        self.weights = BlockWeights(skeleton, resident=resident, past_cache=_too_large_to_stay(skeleton))
        self.blocks = skeleton.blocks
        self.original_blocks = skeleton.checkpoint.original_blocks
        self.device, self.dtype = skeleton.device, skeleton.dtype
        self.memory = "resident" if resident else "streamed"
        self.group = group or len(self.candidates)

    @property
    def tokens(self) -> int:
        """How many tokens are run at a time; fewer once memory ran out."""
        return self.skeleton.tokens

    def weights_only(self, on_weights: OnWeights, on_progress: Callable[[int], object]) -> None:
        """Call `on_weights` for every block; no window is run."""
        for index, block in self.weights.each(range(len(self.blocks))):
            on_weights(index, dict(block.named_parameters()))
            on_progress(1)

    def forward_work(self, *, branches: bool) -> int:
        """Block evaluations of a forward sweep."""
        depth = len(self.blocks)
        return block_evaluations(depth, self.group, self.candidates) if branches else depth

    @torch.no_grad()
    def forward(
        self,
        ids_WT: torch.Tensor,
        *,
        branches: bool,
        keep_inputs: bool = False,
        keep_graphs: bool = False,
        hooks: Hooks = _NO_HOOKS,
        on_progress: Callable[[int], object] = lambda _: None,
        journal: Journal | None = None,
        counted_WT: torch.Tensor | None = None,
        parts: Parts | None = None,
    ) -> ForwardResult:
        """Run the base stream, and with `branches` one stream per skipped block, through all blocks.

        Args:
            ids_WT: the windows.
            branches: run the candidate streams too.
            keep_inputs: keep what the base stream brings to each block.
            keep_graphs: keep more of what a backward sweep needs, as far as that fits.
            hooks: called with what is there at a block.
            on_progress: called with the number of block evaluations (one stream through one block) just done.
            journal: where the state is saved, and where an earlier run's state is.
            counted_WT: which tokens count in a window's loss; by default all that are predicted.
            parts: windows whose gradients a backward sweep is to give apart.
        """
        depth, journal = len(self.blocks), journal or Journal(None)
        saved = journal.found()
        if saved is not None:
            state = ForwardState.restored(saved, ids_WT.device)
        else:
            state = ForwardState(Streams(embedded(self.skeleton, ids_WT)[None]), [] if keep_inputs else None)
        graphs = self._graphs(ids_WT, parts) if keep_graphs and keep_inputs and not branches else None
        groups = groups_of(self.candidates, self.group) if branches else [[]]
        with workers(self.device) as side_by_side:
            for number, members in enumerate(groups):
                following = groups[number + 1][0] if number + 1 < len(groups) else depth
                if state.first >= following:  # done by an earlier run
                    continue
                watched = () if number else self.candidates
                group = _Group(state, ids_WT, counted_WT, following, hooks, watched, on_progress, journal)
                state.streams.make_room(len(members))
                run = functools.partial(through_block, self.skeleton, side_by_side, state.streams, ids_WT)
                kept = run if graphs is None else functools.partial(group.run_or_keep, graphs, self.skeleton, run)
                order = range(state.streams.next, depth)
                sweep(self.weights, state.streams, order, members, kept, group.keeping, gradients=graphs is not None)
                self._losses(group, members)
                state.begin_group(following)
                journal.save(*state.saved())
        stacked = torch.stack(state.candidates) if branches else None
        return ForwardResult(state.base_nll, stacked, state.inputs, state.last_WTD, graphs)

    @torch.no_grad()
    def nll_without(
        self,
        ids_WT: torch.Tensor,
        sets: Sequence[RemovalSet],
        on_progress: Callable[[int], object] = lambda _: None,
        counted_WT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mean NLL per predicted token of each window without each set of blocks, [len(sets), W], float64, on the CPU."""
        found: dict[RemovalSet, torch.Tensor] = {}
        with workers(self.device) as side_by_side:
            for group in groups_that_fit(sets, self.group + 1):
                nll_SW = nll_without(self.skeleton, self.weights, ids_WT, group, side_by_side, on_progress, counted_WT)
                found |= dict(zip(group, nll_SW, strict=True))
        return torch.stack([found[removed] for removed in sets])

    @torch.no_grad()
    def gate_gradients(
        self,
        ids_WT: torch.Tensor,
        settings: Sequence[GateSetting],
        scale_W: torch.Tensor,
        counted_WT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Gradients of the scaled loss over the gates of all blocks, at each setting of them, [S, N], float64."""
        return gate_gradients(self.skeleton, self.weights, ids_WT, settings, scale_W, counted_WT)

    @torch.no_grad()
    def token_seconds(self) -> tuple[list[float], float]:
        """What one token of one text takes in each block, and in embeddings, final norm and head."""
        skeleton, ids_BT = self.skeleton, torch.zeros((1, 1), dtype=torch.long, device=self.device)
        hidden_BTD, calls = skeleton.first_hidden(ids_BT), skeleton.calls(ids_BT)
        blocks = [
            median_seconds(functools.partial(skeleton.run_block, block, hidden_BTD, calls[index]), self.device)
            for index, block in self.weights.each(range(len(self.blocks)))
        ]
        return blocks, median_seconds(functools.partial(skeleton.logits, hidden_BTD, ids_BT), self.device)

    def _losses(self, group: _Group, members: Sequence[int]) -> None:
        """What the streams that came through the last block say."""
        skeleton, state, ids_WT, counted_WT = self.skeleton, group.state, group.ids_WT, group.counted_WT
        streams = state.streams
        if state.base_nll is None and state.inputs is not None:
            state.last_WTD = streams.base.clone()
        if members and group.hooks.on_logits is not None:
            base_nll, *of_members = shown_nll(skeleton, streams, ids_WT, members, group.hooks.on_logits, counted_WT)
            state.base_nll = base_nll if state.base_nll is None else state.base_nll
            state.candidates += of_members
            return
        if state.base_nll is None and (members or state.inputs is None):  # before a backward sweep alone: no losses
            state.base_nll = window_nll(skeleton, streams.base[None], ids_WT, counted_WT)[0]
        if members:
            state.candidates += list(window_nll(skeleton, streams.candidates, ids_WT, counted_WT))

    def _graphs(self, ids_WT: torch.Tensor, parts: Parts | None) -> Graphs | None:
        """Streamed, the last block's alone: a backward sweep begins with it, and holds one batch's graph anyway."""
        last = self.candidates[0]
        if self.memory == "resident":
            return Graphs(self._graph_bytes, last=last, parts=parts) if self._graph_bytes > 0 else None
        one_batch = len(ids_WT) <= self.skeleton.rows_at_a_time(ids_WT)
        return Graphs(first=len(self.blocks) - 1, last=last, parts=parts) if one_batch else None

    def backward(
        self,
        ids_WT: torch.Tensor,
        forward: ForwardResult,
        *,
        loss_scale_W: torch.Tensor,
        on_gradients: OnGradients,
        release_inputs: bool,
        on_progress: Callable[[int], object],
        turn: int,
        journal: Journal,
        counted_WT: torch.Tensor | None = None,
        parts: Parts | None = None,
    ) -> None:
        """Gradients of every block's weights."""
        backward_sweep(
            self.skeleton,
            self.weights,
            ids_WT,
            forward,
            loss_scale_W=loss_scale_W,
            on_gradients=on_gradients,
            counted_WT=counted_WT,
            parts=parts,
            last=self.candidates[0],
            release_inputs=release_inputs,
            on_progress=on_progress,
            turn=turn,
            journal=journal,
        )

    def close(self) -> None:
        """Let files and threads go."""
        self.weights.close()
        return_free_memory()


@dataclass(frozen=True)
class _Group:
    """Candidates that are swept together, and what is done at each block beside running it.

    Attributes:
        state: how far the sweep is.
        ids_WT: the windows.
        counted_WT: which of their tokens count; None for all that are predicted.
        following: the block where the next group begins.
        hooks: called with what is there at a block.
        watched: the blocks whose hidden states are shown: in the first group alone, which the base stream goes all through.
        on_progress: called with the number of block evaluations just done.
        journal: where the state is saved.
    """

    state: ForwardState
    ids_WT: torch.Tensor
    counted_WT: torch.Tensor | None
    following: int
    hooks: Hooks
    watched: Collection[int]
    on_progress: Callable[[int], object]
    journal: Journal

    @contextlib.contextmanager
    def keeping(self, index: int, block: nn.Module, branching: bool) -> Iterator[None]:
        """Within, a block is run."""
        state, streams, is_first = self.state, self.state.streams, self.state.base_nll is None
        if is_first and state.inputs is not None:
            state.inputs.append(streams.base.clone())
        if index == self.following:
            state.next_base_WTD = streams.base.clone()
        if is_first and self.hooks.on_weights is not None:
            self.hooks.on_weights(index, dict(block.named_parameters()))
        came_WTD, evaluations = self._shown(index, branching), streams.active + 1
        yield
        if came_WTD is not None and self.hooks.on_hidden is not None:
            windows = slice(0, len(self.ids_WT))
            self.hooks.on_hidden(index, dict(block.named_parameters()), windows, came_WTD, streams.base)
        self.on_progress(evaluations)
        if self.journal.due():
            self.journal.save(*state.saved())

    def run_or_keep(
        self,
        graphs: Graphs,
        skeleton: Skeleton,
        run: Callable[[nn.Module, int, bool], object],
        block: nn.Module,
        index: int,
        branching: bool,
    ) -> None:
        """Run a block, and keep its graph where that fits."""
        state = self.state
        if not state.inputs or not graphs.through(
            skeleton, block, index, state.inputs[-1], state.streams.base, self.ids_WT
        ):
            run(block, index, branching)

    def _shown(self, index: int, branching: bool) -> torch.Tensor | None:
        """What the base stream brings to a block whose hidden states are shown, where it stays while the block is run."""
        if self.hooks.on_hidden is None or index not in self.watched:
            return None
        if self.state.inputs is not None:
            return self.state.inputs[-1]
        return self.state.streams.base if branching else self.state.streams.base.clone()


def _too_large_to_stay(skeleton: Skeleton) -> bool:
    """Whether its files would push one another out of the page cache. A GPU leaves the host time to read through it.

    Not a matter of what is free now: a run that resumes later must find weights in the same places (`Span.in_place`).
    """
    return skeleton.device.type == "cpu" and skeleton.checkpoint.nbytes > _CACHED_SHARE * installed_bytes()


@torch.no_grad()
def streamed_logits(checkpoint: Checkpoint, order: Sequence[int], ids_BT: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V] in float32 on the CPU, with the blocks at these positions alone, in this order.

    Raises:
        NotSeparableError: its blocks cannot be run one at a time.
    """
    if checkpoint.anatomy.family.resident:
        raise NotSeparableError(checkpoint.source, checkpoint.anatomy.family.resident)
    skeleton = Skeleton(checkpoint, dtype=torch.float32, device=torch.device("cpu"))
    with BlockWeights(skeleton, resident=False) as weights:
        hidden_BTD = skeleton.first_hidden(ids_BT)
        for index, block in weights.each(order):
            hidden_BTD = skeleton.run_block(block, hidden_BTD, skeleton.calls(ids_BT)[index])
        return skeleton.logits(hidden_BTD, ids_BT)
