"""What an engine runs, what is requested of it and what it gives: the same for both, block by block or with the whole model.

Legend: W windows, T tokens, D hidden size, N blocks, S sets of blocks or settings of gates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from shortstack.engine.journal import UNSAVED, Journal

if TYPE_CHECKING:
    from shortstack.engine.backward import Graphs
    from shortstack.engine.losses import Predictions

# Called with (block index, its weights by name) in a forward sweep.
OnWeights = Callable[[int, dict[str, torch.Tensor]], None]
# Called with (block index, its weights by name, which windows, what goes into it, what comes out of it) of the dense model.
OnHidden = Callable[[int, dict[str, torch.Tensor], slice, torch.Tensor, torch.Tensor], None]
# Called with (index of the block skipped, which windows, which of their tokens, what the dense model predicts, what the model
# without the block predicts).
OnLogits = Callable[[int, slice, slice, "Predictions", "Predictions"], None]
# Called with (block index, its weights, their gradients over a part of the windows), for each part in turn.
OnGradients = Callable[[int, dict[str, torch.Tensor], dict[str, torch.Tensor]], None]
OnProgress = Callable[[int], object]  # called with how much of the work was just done

RemovalSet = frozenset[int]  # positions of blocks
GateSetting = Mapping[int, float]  # position of a block -> its gate, of those that are not 1


def slices(whole: slice, size: int) -> list[slice]:
    """A range in pieces of so many, the last one perhaps smaller."""
    return [slice(start, min(start + size, whole.stop)) for start in range(whole.start, whole.stop, size)]


@dataclass(frozen=True)
class Windows:
    """Windows of token ids that go through a model.

    Attributes:
        ids_WT: the ids.
        counted_WT: which tokens count in a window's loss, the first of them never; None for all that are predicted.
        parts: windows whose gradients are wanted apart, side by side, some may be empty; None for all together.
    """

    ids_WT: torch.Tensor
    counted_WT: torch.Tensor | None = None
    parts: Sequence[slice] | None = None

    @staticmethod
    def of(ids: Sequence[Sequence[int]], device: torch.device | None = None) -> Windows:
        """Of lists of token ids."""
        return Windows(torch.tensor([list(window) for window in ids], dtype=torch.long, device=device))

    def __len__(self) -> int:
        return len(self.ids_WT)

    def __getitem__(self, windows: slice) -> Windows:
        return Windows(self.ids_WT[windows], None if self.counted_WT is None else self.counted_WT[windows])

    def repeated(self, times: int) -> Windows:
        """All of them so many times, one time behind the other."""
        counted = None if self.counted_WT is None else self.counted_WT.repeat(times, 1)
        return Windows(self.ids_WT.repeat(times, 1), counted)


@dataclass(frozen=True)
class ForwardRequest:
    """What a forward sweep is to give.

    Attributes:
        branches: losses without each block that is scored, too.
        keep_inputs: what goes into each block is kept.
        keep_graphs: so is more of what a backward sweep needs, as far as that fits.
        on_weights: called once per block.
        on_hidden: called once per block that is scored and some windows.
        on_logits: called once per block that is scored and slice of tokens, with branches.
        on_progress: called with how much of `Engine.forward_work` was just done.
    """

    branches: bool = False
    keep_inputs: bool = False
    keep_graphs: bool = False
    on_weights: OnWeights | None = None
    on_hidden: OnHidden | None = None
    on_logits: OnLogits | None = None
    on_progress: OnProgress = lambda _: None


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
    inputs: list[torch.Tensor] | None = None
    last_WTD: torch.Tensor | None = None
    graphs: Graphs | None = None


@dataclass(frozen=True)
class GradientRequest:
    """What gradients a backward sweep is to give.

    Attributes:
        loss_scale_W: the loss is the sum over windows of this times the window's summed NLL. Gradients are complete sums
            over the windows of a part before `on_gradients` sees them.
        on_gradients: called once per block and part of the windows.
        turn: which of several backward sweeps this is; the saved state names it.
        release_inputs: let what the forward sweep kept go as it is used.
        on_progress: called with the number of block evaluations just done; a gradient is two.
    """

    loss_scale_W: torch.Tensor
    on_gradients: OnGradients
    turn: int = 0
    release_inputs: bool = True
    on_progress: OnProgress = lambda _: None


class Engine(Protocol):
    """What runs a model's blocks for the criteria.

    Attributes:
        blocks: the block modules, in order.
        candidates: positions of those that are scored, ascending.
        original_blocks: their numbers in the original model.
        device, dtype: where and in what it computes.
        memory: `streamed` or `resident`.
        reason: why the whole model is held, or empty.
        group: how many candidates are run together.
    """

    blocks: list[nn.Module]
    candidates: tuple[int, ...]
    original_blocks: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    memory: str
    reason: str
    group: int

    @property
    def tokens(self) -> int:
        """How many tokens are run at a time."""

    def weights_only(self, on_weights: OnWeights, on_progress: OnProgress) -> None:
        """Call `on_weights` for every block; no window is run."""

    def forward_work(self, *, branches: bool) -> int:
        """What `on_progress` of a forward sweep adds up to."""

    def forward(self, windows: Windows, request: ForwardRequest, journal: Journal = UNSAVED) -> ForwardResult:
        """Losses of the dense model, and without each block; what goes into blocks is shown and kept on the way."""

    def backward(
        self, windows: Windows, forward: ForwardResult, request: GradientRequest, journal: Journal = UNSAVED
    ) -> None:
        """Gradients of every block's weights, after a forward sweep of the same windows."""

    def nll_without(
        self, windows: Windows, sets: Sequence[RemovalSet], on_progress: OnProgress = lambda _: None
    ) -> torch.Tensor:
        """Mean NLL per predicted token of each window without each set of blocks, [S, W], float64, on the CPU."""

    def gate_gradients(self, windows: Windows, settings: Sequence[GateSetting], scale_W: torch.Tensor) -> torch.Tensor:
        """Gradients of the scaled loss over the gates of all blocks, at each setting of them, [S, N], float64."""

    def token_seconds(self) -> tuple[list[float], float]:
        """What one token of one text takes in each block, and in all of the rest."""

    def close(self) -> None:
        """Let files and threads go."""
