"""Linear layers through the faster library on this CPU, with weights in that library's own order.

torch sends float32 matrix products on x86 to MKL, which on some CPUs (AMD's with AVX-512) reaches half of what oneDNN,
also inside torch, does with the same float32 arithmetic. Which one is faster here is measured once, in milliseconds.
Either of them is faster still where a weight that many batches are multiplied by is arranged (packed) for it once.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from shortstack.checkpoint.reader import Checkpoint

_WORTH_MEASURING = 1 << 18  # weights of a matrix; below this the calls cost more than the products
_WORTH_PACKING = 1 << 24  # below this many weights: packing is 3 to 10 % faster, and takes the memory of a second copy
_CLEARLY_FASTER = 1.05
_ROWS = 640  # of what is multiplied when they are compared, between a sweep's batches and those with gradients
_BUDGET_SECONDS = 0.2
_PACKED_AT = 3  # the batch, of those that go through a block: packing costs what a batch or two save
_PACKED_FOR_MKL_FROM = 8  # batches: packing for MKL costs half a batch, and saves a tenth of each
_choices: dict[tuple[int, int], bool] = {}
_entered: list[_ThroughOneDNN | _PackedForMKL] = []


@contextlib.contextmanager
def fast_linear(
    dtype: torch.dtype,
    device: torch.device,
    shape: tuple[int, int],
    *,
    chosen: str | None = None,
    announced: bool = False,
) -> Iterator[str]:
    """Within, linear layers on the CPU in float32 go through oneDNN if it is faster; gradients work.

    Args:
        dtype, device: what the model is computed in and on.
        shape: output and input features of a typical weight, on which the two are compared.
        chosen: the library to use where both can be, instead of comparing: what an earlier run decided.
        announced: batches are announced with `batches`, so that MKL too can have its own order of weights.

    Yields:
        The library used: "onednn" or "torch".
    """
    on_cpu = device.type == "cpu" and dtype == torch.float32
    mode: _ThroughOneDNN | _PackedForMKL | None = None
    if on_cpu and _available() and (chosen == "onednn" if chosen else _onednn_is_faster(*shape)):
        mode = _ThroughOneDNN()
    elif on_cpu and announced and _mkl_packs():
        mode = _PackedForMKL()
    name = "onednn" if isinstance(mode, _ThroughOneDNN) else "torch"
    if mode is None:
        yield name
        return
    with mode:
        _entered.append(mode)
        try:
            yield name
        finally:
            _entered.pop()


def batches(count: int, rows: int) -> None:
    """Announce how many batches come through the same weights next, and how many rows most of them have.

    Announced and not counted, so that the same products are packed in every run: packed ones round differently.
    """
    if _entered and isinstance(_entered[-1], _PackedForMKL):
        _entered[-1].shared.rows = rows if count >= _PACKED_FOR_MKL_FROM else 0


def inherited() -> Callable[[], object]:
    """What a thread calls first to use the library that the calling thread uses now: modes are a thread's own."""
    mode = _entered[-1] if _entered else None
    return (lambda: None) if mode is None else (lambda: mode.again().__enter__())  # type: ignore[no-untyped-call]


def largest_matrix(checkpoint: Checkpoint) -> tuple[int, int]:
    """Shape of the first block's largest matrix, on which libraries are compared."""
    matrices = [tensor for tensor in checkpoint.blocks[0] if len(tensor.shape) == 2]
    largest = max(matrices, key=lambda tensor: tensor.numel, default=None)
    return (largest.shape[0], largest.shape[1]) if largest is not None else (1, 1)


_packing = threading.Lock()


class _ThroughOneDNN(TorchFunctionMode):
    def __init__(self, packed: WeakIdKeyDictionary | None = None) -> None:
        super().__init__()
        # A block's weights are made parameters anew each time it comes in, and are forgotten here when it goes.
        self.packed: WeakIdKeyDictionary = WeakIdKeyDictionary() if packed is None else packed

    def again(self) -> _ThroughOneDNN:
        """The same for another thread."""
        return _ThroughOneDNN(self.packed)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.linear and not kwargs and args[1].dtype == args[0].dtype == torch.float32:
            bias = args[2] if len(args) > 2 else None
            if torch.is_grad_enabled():
                return _Linear.apply(args[0], args[1], bias)  # type: ignore[no-untyped-call]
            return _product(args[0], self._arranged(args[1], args[0].numel() // args[0].shape[-1]), bias)
        return func(*args, **(kwargs or {}))

    def _arranged(self, weight: torch.Tensor, rows: int) -> torch.Tensor:
        """The weight; from its third batch on in oneDNN's own order."""
        if not _worth_packing(weight):
            return weight
        with _packing:  # several threads come to a block's batches together
            known: torch.Tensor | int = self.packed.get(weight, 0)  # type: ignore[no-untyped-call]
            if isinstance(known, int):
                known += 1
                if known >= _PACKED_AT:
                    known = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
                self.packed[weight] = known
        return weight if isinstance(known, int) else known


@dataclass
class _Shared:
    """What the threads of a sweep have in common: the announced rows, and weights packed for them."""

    rows: int = 0
    packed: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)


class _PackedForMKL(TorchFunctionMode):
    """MKL's own order of a weight, for batches of exactly the announced rows; gradients go the usual way."""

    def __init__(self, shared: _Shared | None = None) -> None:
        super().__init__()
        self.shared = shared or _Shared()

    def again(self) -> _PackedForMKL:
        """The same for another thread."""
        return _PackedForMKL(self.shared)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.linear and not kwargs and self._for_it(args[0], args[1]):
            bias = args[2] if len(args) > 2 else None
            return torch.ops.mkl._mkl_linear(args[0], self._arranged(args[1]), args[1], bias, self.shared.rows)
        return func(*args, **(kwargs or {}))

    def _for_it(self, x: torch.Tensor, weight: torch.Tensor) -> bool:
        rows = self.shared.rows
        return (
            rows > 0
            and x.numel() == rows * x.shape[-1]
            and x.dtype == weight.dtype == torch.float32
            and _worth_packing(weight)
            and not torch.is_grad_enabled()
        )

    def _arranged(self, weight: torch.Tensor) -> torch.Tensor:
        with _packing:
            known: torch.Tensor | None = self.shared.packed.get(weight)  # type: ignore[no-untyped-call]
            if known is None:
                known = torch.ops.mkl._mkl_reorder_linear_weight(weight.detach(), self.shared.rows)
                self.shared.packed[weight] = known
        return known


class _Linear(torch.autograd.Function):
    """y = x W' + b with its gradients, all three products through oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        for_x = for_weight = for_bias = None
        rows = gradient.flatten(0, -2)
        if ctx.needs_input_grad[0]:
            for_x = _product(gradient, weight.T, None)
        if ctx.needs_input_grad[1]:
            for_weight = _product(rows.T, x.flatten(0, -2).T, None)
        if ctx.needs_input_grad[2]:
            for_bias = rows.sum(dim=0)
        return for_x, for_weight, for_bias


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


def _available() -> bool:
    built: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return built and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _mkl_packs() -> bool:
    built: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    return built and hasattr(torch.ops.mkl, "_mkl_linear")


def _worth_packing(weight: torch.Tensor) -> bool:
    return isinstance(weight, torch.nn.Parameter) and _WORTH_MEASURING <= weight.numel() < _WORTH_PACKING


def _onednn_is_faster(outputs: int, inputs: int) -> bool:
    key = (outputs, inputs)
    if key not in _choices:
        _choices[key] = outputs * inputs >= _WORTH_MEASURING and _measured_ratio(outputs, inputs) > _CLEARLY_FASTER
    return _choices[key]


@torch.no_grad()
def _measured_ratio(outputs: int, inputs: int) -> float:
    """Time of torch's own product over that of oneDNN, the best of a few each, taking turns."""
    x, weight = (
        torch.ones(_ROWS, inputs),
        torch.ones(outputs, inputs),
    )  # not random: the caller's generator stays as it is
    calls: list[Callable[[], torch.Tensor]] = [lambda: functional.linear(x, weight), lambda: _product(x, weight, None)]
    torchs, onednns = best_seconds(calls, rounds=8, budget_seconds=_BUDGET_SECONDS)
    return torchs / onednns


def best_seconds(
    calls: Sequence[Callable[[], object]], *, rounds: int, budget_seconds: float = float("inf")
) -> list[float]:
    """The least time that each call took, of several rounds in which they take turns; at least two, whatever the budget."""
    best = [float("inf")] * len(calls)
    started = time.perf_counter()
    for number in range(rounds):
        if number >= 2 and time.perf_counter() - started > budget_seconds:
            break
        for which, call in enumerate(calls):
            begun = time.perf_counter()
            call()
            best[which] = min(best[which], time.perf_counter() - begun)
    return best
