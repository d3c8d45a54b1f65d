"""Score a model that is held whole, by passing over blocks: for families whose blocks cannot be run one at a time.

Slower and larger than the sweeps (N passes over the model, which must fit in memory), with the same results.

Legend: W windows, T tokens, N blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn

from shortstack.checkpoint.reader import Checkpoint
from shortstack.engine.backward import OnGradients
from shortstack.engine.block_model import TOKENS_AT_A_TIME
from shortstack.engine.bypass import Bypass
from shortstack.engine.forward import ForwardResult, OnWeights
from shortstack.engine.journal import Journal
from shortstack.engine.losses import token_nll


class WholeModel:
    """A loaded model, its blocks, and how to pass over them.

    Args:
        model: weights in, in evaluation mode.
        checkpoint: what it was loaded from.
        sample_BT: a window, a few tokens of which are run once.
        reason: why the model is held whole.
        tokens: how many tokens go through it at a time.
        unremovable: blocks that cannot go: they are run for the state that others need, and their hidden states
            discarded.
        candidates: the blocks to score, by position, ascending; all by default.
    """

    memory = "resident"
    group = 1

    def __init__(
        self,
        model: Any,
        checkpoint: Checkpoint,
        sample_BT: torch.Tensor,
        *,
        reason: str,
        tokens: int | None = None,
        unremovable: Collection[int] = (),
        candidates: Sequence[int] | None = None,
    ) -> None:
        self._model = model
        self._bypass = Bypass(model, checkpoint.anatomy, sample_BT[:, :8])
        self.blocks: list[nn.Module] = list(self._bypass.blocks)
        self.candidates = tuple(range(len(self.blocks)) if candidates is None else candidates)
        self.original_blocks = checkpoint.original_blocks
        self.device = sample_BT.device
        self.reason = reason
        self.tokens = tokens or TOKENS_AT_A_TIME.get(self.device.type, 4096)
        self._unremovable = unremovable

    @torch.no_grad()
    def weights_only(self, on_weights: OnWeights, on_progress: Callable[[int], object]) -> None:
        """Call `on_weights` for every block; no window is run."""
        for index, block in enumerate(self.blocks):
            on_weights(index, dict(block.named_parameters()))
            on_progress(1)

    def forward_work(self, *, branches: bool) -> int:
        """Passes over the model."""
        return 1 + (len(self.candidates) if branches else 0)

    @torch.no_grad()
    def forward(
        self,
        ids_WT: torch.Tensor,
        *,
        branches: bool,
        keep_inputs: bool,
        on_weights: OnWeights,
        on_progress: Callable[[int], object],
        journal: Journal,
    ) -> ForwardResult:
        """Losses of the dense model, and with `branches` without each block; a state is saved after each pass."""
        saved = journal.found()
        base = saved.tensors["base_nll"] if saved is not None else self._window_nll(ids_WT, None)
        candidates = list(saved.tensors["candidates"]) if saved is not None else []
        if saved is None:
            self.weights_only(on_weights, lambda _: None)
        on_progress(1 + len(candidates))
        for place in range(len(candidates), len(self.candidates) if branches else 0):
            candidates.append(self._window_nll(ids_WT, self.candidates[place]))
            on_progress(1)
            if journal.due() or place == len(self.candidates) - 1:
                journal.save({"base_nll": base, "candidates": torch.stack(candidates)}, {"phase": "whole"})
        return ForwardResult(base, torch.stack(candidates) if branches else None, None, None)

    def _window_nll(self, ids_WT: torch.Tensor, skipped: int | None) -> torch.Tensor:
        """Mean NLL per predicted token of each window, float64, with one block passed over or none."""
        over = [] if skipped is None else [skipped]
        with self._bypass.over(over, run=skipped in self._unremovable):
            return torch.cat([self._nll(ids_WT[part]).double().mean(dim=1) for part in self._parts(ids_WT)]).cpu()

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
    ) -> None:
        """Gradients of every block's weights, summed over all windows before `on_gradients` sees them.

        Args:
            loss_scale_W: the loss is the sum over windows of this times the window's summed NLL.
            on_gradients: called once per block.
        """
        parameters = [parameter for block in self.blocks for parameter in block.parameters()]
        for parameter in parameters:
            parameter.requires_grad_(parameter.is_floating_point())
            parameter.grad = None
        for part in self._parts(ids_WT):
            nll = self._nll(ids_WT[part])
            torch.autograd.backward((nll.sum(dim=1) * loss_scale_W[part].to(nll)).sum())
        for index, block in enumerate(self.blocks):
            named = {name: parameter for name, parameter in block.named_parameters() if parameter.grad is not None}
            gradients = {name: parameter.grad for name, parameter in named.items() if parameter.grad is not None}
            weights = {name: parameter.detach() for name, parameter in block.named_parameters()}
            on_gradients(index, weights, gradients)
            on_progress(3)
        for parameter in parameters:
            parameter.grad = None

    def close(self) -> None:
        """Nothing is open."""

    def _nll(self, ids_BT: torch.Tensor) -> torch.Tensor:
        # A few models (CPM-Ant) put tokens of their own before the text: the last T positions are the text's.
        logits = self._model(input_ids=ids_BT, use_cache=False).logits[:, -ids_BT.shape[1] :]
        return token_nll(logits.clone() if not torch.is_grad_enabled() else logits, ids_BT)

    def _parts(self, ids_WT: torch.Tensor) -> list[slice]:
        rows = max(1, self.tokens // ids_WT.shape[1])
        return [slice(start, start + rows) for start in range(0, len(ids_WT), rows)]
