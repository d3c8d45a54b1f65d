"""Hidden states of windows on their way through the blocks of one checkpoint, which stop where they are to be looked at.

Legend: S streams, W windows, T tokens, D hidden size, I inner size of an MLP.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from shortstack.checkpoint.headers import TensorInfo
from shortstack.engine.cpu import workers
from shortstack.engine.forward import Streams, embedded, through_block, window_nll
from shortstack.engine.interface import OnProgress, Windows
from shortstack.engine.streamed import StreamedModel
from shortstack.runtime.devices import exact_place


class States:
    """What goes into one block, and later into others behind it.

    Args:
        model: whose blocks are run, brought in one after another.
        windows: what is run.

    Attributes:
        hidden_WTD: the states.
        next: the block that they go into; the depth, once they have been through all.
    """

    def __init__(self, model: StreamedModel, windows: Windows) -> None:
        self.model = model
        self.windows = windows
        with torch.no_grad():
            self.hidden_WTD = embedded(model.skeleton, windows.ids_WT)
        self.next = 0

    def to(self, block: int, on_progress: OnProgress = lambda _: None) -> None:
        """Run them through all blocks before this one."""
        _through(self.model, Streams(self.hidden_WTD[None]), self.windows.ids_WT, range(self.next, block), on_progress)
        self.next = max(self.next, block)

    @contextlib.contextmanager
    def at_block(self) -> Iterator[nn.Module]:
        """Within, the block that they go into has its weights in; nothing else may be run meanwhile."""
        for _, block in self.model.weights.each([self.next]):
            yield block

    def written(self, block: nn.Module, names: Collection[str]) -> Iterator[tuple[slice, Written]]:
        """What the next block makes of them, some windows at a time.

        Args:
            block: with its weights in.
            names: parameters of the block in which its output is linear: what they write is told apart.
        """
        skeleton, ids_WT, factor = self.model.skeleton, self.windows.ids_WT, None
        for windows in skeleton.batches(ids_WT):
            call = skeleton.calls(ids_WT[windows])[self.next]
            run = functools.partial(skeleton.run_block, block, self.hidden_WTD[windows], call)
            with torch.no_grad():
                found = _told_apart(block, names, run, factor)
            factor = found.factor if found.inner_BTI is not None else None  # of all windows, once some have shown it
            yield windows, found


@dataclass(frozen=True)
class Written:
    """What a block makes of some windows.

    Attributes:
        left_BTD: the hidden states that leave it.
        moved_BTD: the part of them that some of its parameters write.
        inner_BTI: what goes into the one projection that those are; None where they are several.
        factor: what the block multiplies the projection's output by before it is added; 1 for most families.
    """

    left_BTD: torch.Tensor
    moved_BTD: torch.Tensor
    inner_BTI: torch.Tensor | None
    factor: float


def parameters_of(model: StreamedModel, block: int, tensors: Sequence[TensorInfo]) -> list[str]:
    """The parameters, by name within the block, that these stored tensors make; none where other tensors are in them, too."""
    skeleton, own = model.skeleton, {tensor.name for tensor in tensors}
    parts = skeleton.conversion.parts(tensors)
    if any(name not in own for part in parts for name, _ in part.sources):
        return []
    return [part.target.removeprefix(f"{skeleton.blocks_name}.{block}.") for part in parts]


def nll_from(
    model: StreamedModel,
    held_SWTD: torch.Tensor,
    windows: Windows,
    first: int,
    on_progress: OnProgress = lambda _: None,
) -> torch.Tensor:
    """Mean NLL per predicted token, [S, W], float64, on the CPU, of states that go into block `first`; they are lost."""
    streams = Streams(held_SWTD, active=len(held_SWTD) - 1)
    _through(model, streams, windows.ids_WT, range(first, len(model.blocks)), on_progress)
    return window_nll(model.skeleton, held_SWTD, windows)


@torch.no_grad()
def _through(
    model: StreamedModel,
    streams: Streams,
    ids_WT: torch.Tensor,
    order: Sequence[int],
    on_progress: OnProgress,
) -> None:
    with workers(model.device) as side_by_side:
        for index, block in model.weights.each(order):
            through_block(model.skeleton, side_by_side, streams, ids_WT, block, index, False)
            on_progress(streams.active + 1)


def _told_apart(
    block: nn.Module, names: Collection[str], run: Callable[[], torch.Tensor], factor: float | None
) -> Written:
    """Run a block, and again with some parameters zero, unless the factor of what they write is known."""
    owner = _projection(block, names)
    inner: list[torch.Tensor] = []
    outer: list[torch.Tensor] = []

    def keep(_: nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        inner.append(given[0])
        outer.append(output)

    handle = owner.register_forward_hook(keep) if owner is not None else None
    try:
        left_BTD = run()
    finally:
        if handle is not None:
            handle.remove()
    if factor is None or len(inner) != 1:
        with _zero(block, names):
            moved_BTD = left_BTD - run()
        factor = _ratio(moved_BTD, outer[0], left_BTD) if len(inner) == 1 else None
        if factor is None:
            return Written(left_BTD, moved_BTD, None, 1.0)
    # Some families (OPT) hand their projections the tokens of all windows in one row. The output itself is more exact than
    # the difference of two states.
    shape = (*left_BTD.shape[:2], -1)
    return Written(left_BTD, factor * outer[0].reshape(shape), inner[0].reshape(shape), factor)


def _projection(block: nn.Module, names: Collection[str]) -> nn.Module | None:
    """The module that these parameters are, where they are the weight and bias of one matrix."""
    owners = {name.rpartition(".")[0] for name in names}
    owner = block.get_submodule(owners.pop()) if len(owners) == 1 else None
    weight = getattr(owner, "weight", None)
    return owner if isinstance(weight, torch.Tensor) and weight.ndim == 2 else None


@contextlib.contextmanager
def _zero(block: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Within, these parameters are zero."""
    holders = [(block.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
    before = [getattr(holder, last) for holder, last in holders]
    try:
        for (holder, last), parameter in zip(holders, before, strict=True):
            setattr(holder, last, nn.Parameter(torch.zeros_like(parameter), requires_grad=False))
        yield
    finally:
        for (holder, last), parameter in zip(holders, before, strict=True):
            setattr(holder, last, parameter)


_SAME = 1e-3  # of what is added, beside rounding
_ONE = 1e-3  # a factor that is nearer to 1 is 1


def _ratio(moved: torch.Tensor, output: torch.Tensor, left: torch.Tensor) -> float | None:
    """The one number that an output is multiplied by to give what is added; None where there is none."""
    if output.numel() != moved.numel():
        return None
    added, given = exact_place(moved).flatten().double(), exact_place(output).flatten().double()
    factor = float(added @ given / (given @ given).clamp_min(1e-300))
    apart = float((added - factor * given).norm())
    rounding = torch.finfo(left.dtype).eps * float(exact_place(left).double().norm())
    if not apart <= _SAME * float(added.norm()) + rounding:
        return None
    return 1.0 if abs(factor - 1) < _ONE else factor
