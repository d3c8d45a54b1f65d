"""The engine that runs a model one block at a time: skeleton, weights and sweeps together."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from shortstack.checkpoint.reader import Checkpoint
from shortstack.engine.backward import Graphs, backward_sweep, gate_gradients
from shortstack.engine.block_model import NotSeparableError, Skeleton
from shortstack.engine.block_weights import BlockWeights
from shortstack.engine.cpu import SideBySide, workers
from shortstack.engine.forward import (
    ForwardState,
    Streams,
    block_evaluations,
    embedded,
    groups_of,
    shown_nll,
    through_block,
    window_nll,
)
from shortstack.engine.interface import (
    ForwardRequest,
    ForwardResult,
    GateSetting,
    GradientRequest,
    OnProgress,
    OnWeights,
    RemovalSet,
    Windows,
)
from shortstack.engine.journal import UNSAVED, Journal
from shortstack.engine.removal_sets import groups_that_fit, nll_without
from shortstack.runtime.memory import installed_bytes, return_free_memory
from shortstack.runtime.stopwatch import median_seconds

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

    def weights_only(self, on_weights: OnWeights, on_progress: OnProgress) -> None:
        """Call `on_weights` for every block; no window is run."""
        for index, block in self.weights.each(range(len(self.blocks))):
            on_weights(index, dict(block.named_parameters()))
            on_progress(1)

    def forward_work(self, *, branches: bool) -> int:
        """Block evaluations of a forward sweep."""
        depth = len(self.blocks)
        return block_evaluations(depth, self.group, self.candidates) if branches else depth

    @torch.no_grad()
    def forward(self, windows: Windows, request: ForwardRequest, journal: Journal = UNSAVED) -> ForwardResult:
        """Run the base stream, and with branches one stream per skipped block, through all blocks.

        Args:
            journal: where the state is saved, and where an earlier run's state is.
        """
        groups = groups_of(self.candidates, self.group) if request.branches else [[]]
        ends = [*(members[0] for members in groups[1:]), len(self.blocks)]
        sweep = _ForwardSweep(self, windows, request, journal)
        with workers(self.device) as side_by_side:
            for members, following in zip(groups, ends, strict=True):
                if sweep.state.first < following:  # else done by an earlier run
                    sweep.group(members, following, side_by_side)
        state = sweep.state
        without = torch.stack(state.candidates) if request.branches else None
        return ForwardResult(state.base_nll, without, state.inputs, state.last_WTD, sweep.graphs)

    @torch.no_grad()
    def nll_without(
        self, windows: Windows, sets: Sequence[RemovalSet], on_progress: OnProgress = lambda _: None
    ) -> torch.Tensor:
        """Mean NLL per predicted token of each window without each set of blocks, [S, W], float64, on the CPU."""
        found: dict[RemovalSet, torch.Tensor] = {}
        with workers(self.device) as side_by_side:
            for group in groups_that_fit(sets, self.group + 1):
                nll_SW = nll_without(self.weights, windows, group, side_by_side, on_progress)
                found |= dict(zip(group, nll_SW, strict=True))
        return torch.stack([found[removed] for removed in sets])

    @torch.no_grad()
    def gate_gradients(self, windows: Windows, settings: Sequence[GateSetting], scale_W: torch.Tensor) -> torch.Tensor:
        """Gradients of the scaled loss over the gates of all blocks, at each setting of them, [S, N], float64."""
        return gate_gradients(self.weights, windows, settings, scale_W)

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

    def backward(
        self, windows: Windows, forward: ForwardResult, request: GradientRequest, journal: Journal = UNSAVED
    ) -> None:
        """Gradients of every block's weights, down to the first that is scored."""
        backward_sweep(self.weights, windows, forward, request, journal, last=self.candidates[0])

    def graphs(self, windows: Windows) -> Graphs | None:
        """Streamed, the last block's alone: a backward sweep begins with it, and holds one batch's graph anyway."""
        last = self.candidates[0]
        if self.memory == "resident":
            return Graphs(windows, limit_bytes=self._graph_bytes, last=last) if self._graph_bytes > 0 else None
        one_batch = len(windows) <= self.skeleton.rows_at_a_time(windows.ids_WT)
        return Graphs(windows, first=len(self.blocks) - 1, last=last) if one_batch else None

    def close(self) -> None:
        """Let files and threads go."""
        self.weights.close()
        return_free_memory()


class _ForwardSweep:
    """One forward sweep; how far it is is in `state`."""

    def __init__(self, model: StreamedModel, windows: Windows, request: ForwardRequest, journal: Journal) -> None:
        self.model, self.windows, self.request, self.journal = model, windows, request, journal
        saved = journal.found()
        if saved is not None:
            self.state = ForwardState.restored(saved, model.device)
        else:
            base_WTD = embedded(model.skeleton, windows.ids_WT)
            self.state = ForwardState(Streams(base_WTD[None]), [] if request.keep_inputs else None)
        keeps_graphs = request.keep_graphs and request.keep_inputs and not request.branches
        self.graphs = model.graphs(windows) if keeps_graphs else None

    def group(self, members: Sequence[int], following: int, side_by_side: SideBySide) -> None:
        """Bring a block in; run the base and the candidates through it; keep what the criteria need.

        Args:
            members: the blocks that a candidate skips: there the base stream branches.
            following: the block where the next group begins.
        """
        model, state, streams = self.model, self.state, self.state.streams
        streams.make_room(len(members))
        order = range(streams.next, len(model.blocks))
        for index, block in model.weights.each(order, gradients=self.graphs is not None):
            branching, evaluations = index in members, streams.active + 1
            if index == following:
                state.next_base_WTD = streams.base.clone()
            with self._shown(index, block, branching):
                if not self._kept(index, block):
                    through_block(model.skeleton, side_by_side, streams, self.windows.ids_WT, block, index, branching)
                streams.active += branching
                streams.next = index + 1
            self.request.on_progress(evaluations)
            if self.journal.due():
                self.journal.save(*state.saved())
        self._losses(members)
        state.begin_group(following)
        self.journal.save(*state.saved())

    @contextlib.contextmanager
    def _shown(self, index: int, block: nn.Module, branching: bool) -> Iterator[None]:
        """Within, a block is run: what goes in is kept, and shown with what comes out, as the base stream first passes."""
        state, streams, on_hidden = self.state, self.state.streams, self.request.on_hidden
        if state.base_nll is not None:  # a later group
            yield
            return
        if state.inputs is not None:
            state.inputs.append(streams.base.clone())
        if self.request.on_weights is not None:
            self.request.on_weights(index, dict(block.named_parameters()))
        if on_hidden is None or index not in self.model.candidates:
            yield
            return
        stays = state.inputs[-1] if state.inputs is not None else streams.base
        came_WTD = stays if branching or state.inputs is not None else stays.clone()
        yield
        on_hidden(index, dict(block.named_parameters()), slice(0, len(self.windows)), came_WTD, streams.base)

    def _kept(self, index: int, block: nn.Module) -> bool:
        """Whether a block was run and its graph kept, where that is wanted and fits."""
        state, graphs = self.state, self.graphs
        if graphs is None or not state.inputs:
            return False
        return graphs.through(self.model.skeleton, block, index, state.inputs[-1], state.streams.base)

    def _losses(self, members: Sequence[int]) -> None:
        """What the streams that came through the last block say."""
        skeleton, on_logits = self.model.skeleton, self.request.on_logits
        state, streams = self.state, self.state.streams
        if state.base_nll is None and state.inputs is not None:
            state.last_WTD = streams.base.clone()
        if members and on_logits is not None:
            base_nll, *of_members = shown_nll(skeleton, streams, self.windows, members, on_logits)
            state.base_nll = base_nll if state.base_nll is None else state.base_nll
            state.candidates += of_members
            return
        if state.base_nll is None and (members or state.inputs is None):  # before a backward sweep alone: no losses
            state.base_nll = window_nll(skeleton, streams.base[None], self.windows)[0]
        if members:
            state.candidates += list(window_nll(skeleton, streams.candidates, self.windows))


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
