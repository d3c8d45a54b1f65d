"""What a CPU computes with: the library of its float32 products, and batches side by side.

torch sends float32 matrix products on x86 to MKL, which on AMD's CPUs reaches half to nine tenths of what oneDNN, also
inside torch, does with the same float32 arithmetic; on Intel's it is the faster one. So the maker of the CPU decides, and
not a stopwatch: the same command on the same machine gives the same numbers. Within one product all cores wait for the
slowest at every step; batches on cores of their own never do.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from shortstack.errors import UsageError
from shortstack.runtime.cgroups import processors
from shortstack.runtime.devices import Kernels, cpu_maker
from shortstack.runtime.private_names import check_onednn, has_onednn, onednn_order, onednn_product

# Weights of a matrix that is packed: packing smaller ones costs more than it saves, larger ones the memory of a copy.
_WORTH_PACKING = range(1 << 18, 1 << 24)
_PACKED_AT = 3  # the batch, of those that go through a block
_thread = threading.local()  # `mode`: the one that this thread has entered


@contextlib.contextmanager
def computing(dtype: torch.dtype, device: torch.device, kernels: Kernels = "auto") -> Iterator[str]:
    """Within, the CPU computes with all cores that this process may use, and float32 products of linear layers go through one
    library; gradients work. What belongs to the process is put back.

    Args:
        dtype, device: what the model is computed in and on.
        kernels: the library; `auto` is oneDNN on CPUs of AMD and torch's own choice on all others.

    Yields:
        The library used: "onednn" or "torch".

    Raises:
        UsageError: oneDNN was requested where it cannot be used.
    """
    before, outer = torch.get_num_threads(), getattr(_thread, "mode", None)
    library = library_for(dtype, device, kernels)
    if device.type == "cpu" and usable_threads() != before:
        torch.set_num_threads(usable_threads())
    try:
        with _ThroughOneDNN() if library == "onednn" else contextlib.nullcontext() as mode:
            _thread.mode = mode
            yield library
    finally:
        _thread.mode = outer
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def library_for(dtype: torch.dtype, device: torch.device, kernels: Kernels) -> str:
    """ "onednn" or "torch", for float32 products of linear layers.

    Raises:
        UsageError: oneDNN was requested where it cannot be used.
    """
    possible = has_onednn() and device.type == "cpu" and dtype == torch.float32
    if kernels == "onednn" and not possible:
        check_onednn()
        place = f"{str(dtype).removeprefix('torch.')} on {device}"
        raise UsageError(f"--cpu-kernels onednn: for float32 on a CPU, not for {place}", hint="leave it out")
    wanted = kernels == "onednn" or (kernels == "auto" and cpu_maker() == "AuthenticAMD")
    return "onednn" if possible and wanted else "torch"


def _inherited() -> Callable[[], object]:
    """What a thread calls first to use the library that the calling thread uses now: modes are a thread's own."""
    mode = getattr(_thread, "mode", None)
    return (lambda: None) if mode is None else (lambda: _ThroughOneDNN(mode.packed).__enter__())  # type: ignore[no-untyped-call]


_packing = threading.Lock()


class _ThroughOneDNN(TorchFunctionMode):
    def __init__(self, packed: WeakIdKeyDictionary | None = None) -> None:
        super().__init__()
        # A block's weights become parameters each time it comes in, and are forgotten here when it goes.
        self.packed: WeakIdKeyDictionary = WeakIdKeyDictionary() if packed is None else packed

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.linear and not kwargs and args[1].dtype == args[0].dtype == torch.float32:
            bias = args[2] if len(args) > 2 else None
            if torch.is_grad_enabled():
                rows = _Linear.apply(args[0].reshape(-1, args[0].shape[-1]), args[1], bias)  # type: ignore[no-untyped-call]
                return rows.view(*args[0].shape[:-1], -1)  # a view of what it gave: models may change it in place
            return onednn_product(args[0], self._arranged(args[1], args[0].numel() // args[0].shape[-1]), bias)
        return func(*args, **(kwargs or {}))

    def _arranged(self, weight: torch.Tensor, rows: int) -> torch.Tensor:
        """The weight; from its third batch on in oneDNN's own order: packing costs what a batch or two save."""
        if not isinstance(weight, torch.nn.Parameter) or weight.numel() not in _WORTH_PACKING:
            return weight
        with _packing:  # several threads come to a block's batches together
            known: torch.Tensor | int = self.packed.get(weight, 0)  # type: ignore[no-untyped-call]
            if isinstance(known, int):
                known += 1
                if known >= _PACKED_AT:
                    known = onednn_order(weight.detach(), rows)
                self.packed[weight] = known
        return weight if isinstance(known, int) else known


class _Linear(torch.autograd.Function):
    """y = x W' + b of rows x with its gradients, all three products through oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        for_x = for_weight = for_bias = None
        if ctx.needs_input_grad[0]:
            for_x = onednn_product(gradient, weight.T, None)
        if ctx.needs_input_grad[1]:
            for_weight = onednn_product(gradient.T, x.T, None)
        if ctx.needs_input_grad[2]:
            for_bias = gradient.sum(dim=0)
        return for_x, for_weight, for_bias


Item = TypeVar("Item")
Result = TypeVar("Result")


class SideBySide(Protocol):
    """Like `map`."""

    def __call__(self, work: Callable[[Item], Result], items: Sequence[Item], /) -> Iterator[Result]:
        """What `work` makes of each item, in their order."""


USUAL_COUNT = 4  # each holds the activations of a batch
_LARGEST_COUNT = 13


def usable_threads() -> int:
    """How many threads compute: torch's number, but no more than the processors that this process may use.

    torch looks at the affinity, not at a container's share of processor time; a number that the user set stands.
    """
    threads = torch.get_num_threads()
    return threads if "OMP_NUM_THREADS" in os.environ else min(threads, processors())


def worker_count(device: torch.device) -> int:
    """How many batches are run side by side: each by the same number of threads, and no thread is left over."""
    if device.type != "cpu":
        return 1
    threads = usable_threads()
    even = (count for count in range(2, _LARGEST_COUNT + 1) if threads % count == 0)
    return min(even, key=lambda count: (abs(count - USUAL_COUNT), count), default=1)


@contextlib.contextmanager
def workers(device: torch.device) -> Iterator[SideBySide]:
    """Gives a function like `map` that does its work, without gradients, in several threads where that is faster."""
    count, threads, before = worker_count(device), usable_threads(), torch.get_num_threads()
    if count == 1:
        yield map
        return
    enter = _inherited()

    def begin() -> None:
        torch.set_num_threads(threads // count)  # of this thread; torch gives the number to those that start later, too
        torch.set_grad_enabled(False)
        enter()

    pool = ThreadPoolExecutor(count, thread_name_prefix="shortstack-batch", initializer=begin)
    try:
        yield pool.map
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)
