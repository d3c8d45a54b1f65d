"""Score a model that is held whole, by passing over blocks: for families whose blocks cannot be run one at a time.

Slower and larger than the sweeps (N passes over the model, which must fit in memory), with the same results.

Legend: W windows, T tokens, N blocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from shortstack.checkpoint.reader import Checkpoint
from shortstack.engine.block_model import TOKENS_AT_A_TIME
from shortstack.engine.interface import (
    ForwardRequest,
    ForwardResult,
    GateSetting,
    GradientRequest,
    OnProgress,
    OnWeights,
    RemovalSet,
    Windows,
    slices,
)
from shortstack.engine.journal import UNSAVED, Journal
from shortstack.engine.losses import Predictions, mean_nll, scaled_loss, token_nll
from shortstack.engine.stand_ins import Bypass
from shortstack.runtime.devices import exact_place
from shortstack.runtime.stopwatch import medians_of_runs, now


class WholeModel:
    """A loaded model, its blocks, and how to bypass them.

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
        self.device, self.dtype = sample_BT.device, next(model.parameters()).dtype
        self.reason = reason
        self.tokens = tokens or TOKENS_AT_A_TIME.get(self.device.type, 4096)
        self._unremovable = unremovable

    @torch.no_grad()
    def weights_only(self, on_weights: OnWeights, on_progress: OnProgress = lambda _: None) -> None:
        """Call `on_weights` for every block; no window is run."""
        for index, block in enumerate(self.blocks):
            on_weights(index, dict(block.named_parameters()))
            on_progress(1)

    def forward_work(self, *, branches: bool) -> int:
        """Passes over the model."""
        return 1 + (len(self.candidates) if branches else 0)

    @torch.no_grad()
    def forward(self, windows: Windows, request: ForwardRequest, journal: Journal = UNSAVED) -> ForwardResult:
        """Losses of the dense model, and with branches without each block; a state is saved after each pass.

        No graphs are kept: a backward sweep runs the model again.

        As many windows as are run at a time go through the model once for each pass: what is compared is there together.
        """
        skipped = self.candidates if request.branches else ()
        passes, parts = 1 + len(skipped), self._parts(windows)
        saved, states = journal.found(), _States(len(self.blocks)) if request.keep_inputs else None
        if saved is not None:
            nll_PW, done = saved.tensors["nll"], int(saved.record["passes"])
            if states is not None:
                states.restore(saved.tensors)
        else:
            nll_PW, done = torch.zeros(passes, len(windows), dtype=torch.float64), 0
            if request.on_weights is not None:
                self.weights_only(request.on_weights)
        request.on_progress(done // len(parts))
        for number, part in enumerate(parts):
            first = min(passes, max(0, done - number * passes))  # those of this part that an earlier run made
            for place, nll_B in self._passes(windows[part], part, skipped, first, request, states):
                nll_PW[place, part] = nll_B
                now = number * passes + place + 1
                request.on_progress(now // len(parts) - (now - 1) // len(parts))
                if journal.due() or now == len(parts) * passes:
                    kept = states.saved() if states is not None else {}
                    journal.save({"nll": nll_PW, **kept}, {"phase": "whole", "passes": now})
        without = nll_PW[1:] if request.branches else None
        if states is None:
            return ForwardResult(nll_PW[0], without)
        *inputs, last_WTD = states.whole()
        return ForwardResult(nll_PW[0], without, inputs, last_WTD)

    @torch.no_grad()
    def nll_without(
        self, windows: Windows, sets: Sequence[RemovalSet], on_progress: OnProgress = lambda _: None
    ) -> torch.Tensor:
        """Mean NLL per predicted token of each window without each set of blocks, [S, W], float64, on the CPU."""
        nll_SW = torch.zeros(len(sets), len(windows), dtype=torch.float64)
        for place, removed in enumerate(sets):
            with self._bypass.over(sorted(removed), run=not removed.isdisjoint(self._unremovable)):
                for part in self._parts(windows):
                    some = windows[part]
                    nll_SW[place, part] = _mean_nll(Predictions(self._logits(some.ids_WT)), some)
            on_progress(len(self.blocks) - len(removed))
        return nll_SW

    def gate_gradients(self, windows: Windows, settings: Sequence[GateSetting], scale_W: torch.Tensor) -> torch.Tensor:
        """Gradients of the scaled loss over the gates of all blocks, at each setting of them, [S, N], float64."""
        self._model.requires_grad_(False)
        found_SN = torch.zeros(len(settings), len(self.blocks), dtype=torch.float64)
        for number, setting in enumerate(settings):
            gates_N = torch.ones(len(self.blocks), dtype=self.dtype, device=self.device)
            for place, gate in setting.items():
                gates_N[place] = gate
            with self._bypass.gated(gates_N.requires_grad_(True)):
                self._lose(windows, scale_W)
            if gates_N.grad is not None:
                found_SN[number] = exact_place(gates_N.grad).double().cpu()
        return found_SN

    @torch.no_grad()
    def token_seconds(self) -> tuple[list[float], float]:
        """What one token of one text takes in each block, and in all of the rest."""
        ids_BT = torch.zeros((1, 1), dtype=torch.long, device=self.device)
        begun, spent = [0.0], [0.0] * len(self.blocks)

        def before(*_: Any) -> None:
            begun.append(now(self.device))

        def run() -> list[float]:
            whole = now(self.device)
            self._logits(ids_BT)
            return [*spent, now(self.device) - whole]

        with contextlib.ExitStack() as watching:
            for index, block in enumerate(self.blocks):

                def after(*_: Any, index: int = index) -> None:
                    spent[index] = now(self.device) - begun.pop()

                for handle in (block.register_forward_pre_hook(before), block.register_forward_hook(after)):
                    watching.callback(handle.remove)
            *blocks, whole = medians_of_runs(run)
        return blocks, max(0.0, whole - sum(blocks))

    def _passes(
        self,
        some: Windows,
        part: slice,
        skipped: Sequence[int],
        first: int,
        request: ForwardRequest,
        states: _States | None,
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """(0, mean NLL of each window in float64), then (place, the same without each block), from pass `first` on."""
        on_logits, on_hidden, ids_BT, dense = request.on_logits, request.on_hidden, some.ids_WT, None
        if first == 0 or (on_logits is not None and first <= len(skipped)):
            with contextlib.ExitStack() as watching:
                if first == 0 and on_hidden is not None:

                    def shown(index: int, came_BTD: torch.Tensor, left_BTD: torch.Tensor) -> None:
                        on_hidden(index, dict(self.blocks[index].named_parameters()), part, came_BTD, left_BTD)

                    watching.enter_context(self._watched(self.candidates, ids_BT, shown))
                if first == 0 and states is not None:
                    watching.enter_context(self._watched(range(len(self.blocks)), ids_BT, states.keep))
                dense = Predictions(self._logits(ids_BT))
        if first == 0 and dense is not None:
            yield 0, _mean_nll(dense, some, shown=on_logits is not None)
        for place, index in enumerate(skipped, start=1):
            if place < first:
                continue
            with self._bypass.over([index], run=index in self._unremovable):
                without = Predictions(self._logits(ids_BT))
            if on_logits is not None and dense is not None:
                on_logits(index, part, slice(0, ids_BT.shape[1]), dense, without)
            yield place, _mean_nll(without, some, shown=on_logits is not None)

    @contextlib.contextmanager
    def _watched(
        self, indices: Sequence[int], ids_BT: torch.Tensor, shown: Callable[[int, torch.Tensor, torch.Tensor], None]
    ) -> Iterator[None]:
        """Within, `shown` is given what goes into each of these blocks, and what comes out."""

        def hook_of(index: int) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any], output: Any) -> None:
                came = args[0] if args else given["hidden_states"]
                left = output[0] if isinstance(output, (tuple, list)) else output
                shown(index, _of_text(came, ids_BT), _of_text(left, ids_BT))

            return hook

        handles = [self.blocks[index].register_forward_hook(hook_of(index), with_kwargs=True) for index in indices]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def backward(
        self, windows: Windows, forward: ForwardResult, request: GradientRequest, journal: Journal = UNSAVED
    ) -> None:
        """Gradients of every block's weights; the model's own of all parts of the windows are held together."""
        parameters = [parameter for block in self.blocks for parameter in block.parameters()]
        for parameter in parameters:
            parameter.requires_grad_(parameter.is_floating_point())
            parameter.grad = None
        of_parts: list[dict[nn.Parameter, torch.Tensor]] = []
        for part in windows.parts or [slice(0, len(windows))]:
            self._lose(windows[part], request.loss_scale_W[part])
            of_parts.append({one: one.grad for one in parameters if one.grad is not None})
            for parameter in parameters:
                parameter.grad = None
        for index, block in enumerate(self.blocks):
            named = dict(block.named_parameters())  # blocks may share some: their gradients stay for the next one
            for gradients in of_parts:
                own = {name: gradients[parameter] for name, parameter in named.items() if parameter in gradients}
                request.on_gradients(index, {name: parameter.detach() for name, parameter in named.items()}, own)
            request.on_progress(3)

    def close(self) -> None:
        """Nothing is open."""

    def _logits(self, ids_BT: torch.Tensor) -> torch.Tensor:
        # A few models (CPM-Ant) put tokens of their own before the text: the last T positions are the text's.
        logits: torch.Tensor = self._model(input_ids=ids_BT, use_cache=False).logits[:, -ids_BT.shape[1] :]
        return logits

    def _lose(self, windows: Windows, scale_W: torch.Tensor) -> None:
        """Add the gradients of the scaled loss to what asks for them."""
        for part in self._parts(windows):
            some = windows[part]
            nll = token_nll(self._logits(some.ids_WT), some.ids_WT)
            torch.autograd.backward(scaled_loss(nll, scale_W[part], some.counted_WT))

    def _parts(self, windows: Windows) -> list[slice]:
        """Windows that go through the model together."""
        return slices(slice(0, len(windows)), max(1, self.tokens // windows.ids_WT.shape[1]))


def _of_text(hidden: torch.Tensor, ids_BT: torch.Tensor) -> torch.Tensor:
    """Hidden states of the text's tokens; what a family has beside them for each token stands behind one another in D.

    A few put tokens of their own before the text (CPM-Ant), or hold several streams, which lie before the windows (Gemma 3n).
    """
    rows, tokens = ids_BT.shape
    if hidden.ndim > 3 and hidden.shape[1:3] == (rows, tokens):
        hidden = hidden.movedim(0, 2)
    return hidden[:, -tokens:].flatten(2)


def _mean_nll(predictions: Predictions, some: Windows, *, shown: bool = False) -> torch.Tensor:
    """Mean NLL per predicted token of each window, float64, on the CPU.

    Args:
        shown: the logits are shown to criteria too: they stay as they are.
    """
    ids_BT, counted_BT = some.ids_WT, some.counted_WT
    if not shown:
        return mean_nll(token_nll(predictions.logits_BTV, ids_BT), counted_BT)
    if counted_BT is None:
        return predictions.summed_nll(ids_BT[:, 1:]) / (ids_BT.shape[1] - 1)
    return predictions.summed_nll(ids_BT[:, 1:], counted_BT[:, 1:]) / counted_BT[:, 1:].sum(dim=1).cpu()


class _States:
    """What went into each block of the dense model so far, and what came out of the last one; windows behind one another."""

    def __init__(self, depth: int) -> None:
        self._parts: list[list[torch.Tensor]] = [[] for _ in range(depth + 1)]

    def keep(self, index: int, came_BTD: torch.Tensor, left_BTD: torch.Tensor) -> None:
        """Keep what a pass over some windows brings to a block, and what the last one gives."""
        self._parts[index].append(came_BTD.clone())
        if index == len(self._parts) - 2:
            self._parts[index + 1].append(left_BTD.clone())

    def whole(self) -> list[torch.Tensor]:
        """What goes into each block, and behind them what comes out of the last one, [W, T, D] each."""
        return [torch.cat(parts) for parts in self._parts]

    def saved(self) -> dict[str, torch.Tensor]:
        """For the journal."""
        return {f"states.{index:05d}": torch.cat(parts) for index, parts in enumerate(self._parts) if parts}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """From the journal."""
        for index, parts in enumerate(self._parts):
            parts += [tensors[name] for name in (f"states.{index:05d}",) if name in tensors]
