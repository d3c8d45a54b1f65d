"""What makes a CPU fast: the faster library for linear layers, batches side by side, and the faster precision.

torch sends float32 matrix products on x86 to MKL, which on some CPUs (AMD's with AVX-512) reaches half of what oneDNN,
also inside torch, does with the same float32 arithmetic. Which one is faster here is measured once, in milliseconds.
Within one product all cores wait for the slowest at every step; batches on cores of their own never do. And bfloat16 is
slower than float32 on some CPUs, twice as fast on others: a long run measures that, too.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from shortstack.checkpoint.reader import Checkpoint
from shortstack.runtime.cgroups import processors
from shortstack.runtime.devices import DType, pick_dtype

_WORTH_MEASURING = 1 << 18  # weights of a matrix; below this the calls cost more than the products
_WORTH_PACKING = 1 << 24  # below this many weights: packing is 3 to 6 % faster, and takes the memory of a second copy
_CLEARLY_FASTER = 1.05
_ROWS = 640  # of what is multiplied when they are compared, between a sweep's batches and those with gradients
_BUDGET_SECONDS = 0.2
_PACKED_AT = 3  # the batch, of those that go through a block
_choices: dict[tuple[int, int], bool] = {}
_entered: list[_ThroughOneDNN] = []


@contextlib.contextmanager
def fast_linear(
    dtype: torch.dtype, device: torch.device, shape: tuple[int, int], *, chosen: str | None = None
) -> Iterator[str]:
    """Within, linear layers on the CPU in float32 go through oneDNN if it is faster; gradients work.

    Args:
        dtype, device: what the model is computed in and on.
        shape: output and input features of a typical weight, on which the two are compared.
        chosen: the library to use where both can be, instead of comparing: what an earlier run decided.

    Yields:
        The library used: "onednn" or "torch".
    """
    possible = _available() and device.type == "cpu" and dtype == torch.float32
    if not possible or not (chosen == "onednn" if chosen else _onednn_is_faster(*shape)):
        yield "torch"
        return
    mode = _ThroughOneDNN()
    with mode:
        _entered.append(mode)
        try:
            yield "onednn"
        finally:
            _entered.pop()


def inherited() -> Callable[[], object]:
    """What a thread calls first to use the library that the calling thread uses now: modes are a thread's own."""
    packed = _entered[-1].packed if _entered else None
    return (lambda: None) if packed is None else (lambda: _ThroughOneDNN(packed).__enter__())  # type: ignore[no-untyped-call]


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
        """The weight; from its third batch on in oneDNN's own order: packing costs what a batch or two save."""
        if not isinstance(weight, torch.nn.Parameter) or not _WORTH_MEASURING <= weight.numel() < _WORTH_PACKING:
            return weight
        with _packing:  # several threads come to a block's batches together
            known: torch.Tensor | int = self.packed.get(weight, 0)  # type: ignore[no-untyped-call]
            if isinstance(known, int):
                known += 1
                if known >= _PACKED_AT:
                    known = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
                self.packed[weight] = known
        return weight if isinstance(known, int) else known


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
    enter = inherited()

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


WORTH_IT = 1.3  # how many times as fast bfloat16 must be
_LONG_RUN = 1e12  # operations: some seconds on a laptop; below, measuring would take longer than it can save
_PRECISION_BUDGET_SECONDS = 0.5
_TOKENS = 128


def chosen_dtype(
    name: DType, checkpoint: Checkpoint, device: torch.device, operations: float, *, say: Callable[[str], object]
) -> torch.dtype:
    """What a scoring run computes in.

    Args:
        name: what was asked for. `auto` on a GPU is bfloat16, which GPUs are made for, also where the checkpoint is stored
            in float32, and float16 where it is float16. On a CPU it is float32, or bfloat16 where the checkpoint is stored
            in it, the run is long, and it measures at least 1.3 times as fast.
        operations: of the whole run, about.
        say: is given a line with what was measured and chosen.
    """
    stored = checkpoint.tensors[checkpoint.anatomy.embedding].dtype
    asked = name
    if name == "auto" and device.type == "cpu" and stored == "BF16" and operations >= _LONG_RUN:
        ratio = bfloat16_speed(*largest_matrix(checkpoint))
        name = "bfloat16" if ratio >= WORTH_IT else "float32"
        say(
            f"--dtype auto: {name}; bfloat16, which the checkpoint is stored in, is {ratio:.2g} times as fast as float32 here"
        )
    elif name == "auto" and device.type == "cuda" and stored != "F16":
        name = "bfloat16"
    computed = pick_dtype(name, stored, device)
    if asked == "auto" and computed.itemsize < {"F32": 4, "F64": 8}.get(stored, 0):
        say(f"--dtype auto: {str(computed).removeprefix('torch.')} on {device}; the checkpoint is stored in {stored}")
    return computed


@torch.no_grad()
def bfloat16_speed(outputs: int, inputs: int) -> float:
    """How many times as fast bfloat16 is, for a feed-forward layer of this shape on some tokens: the best of what half a
    second allows, taking turns."""
    cpu = torch.device("cpu")
    outputs, inputs = min(outputs, 4096), min(inputs, 4096)  # larger ones say the same and take seconds

    def layer(dtype: torch.dtype) -> Callable[[], torch.Tensor]:
        shapes = ((_TOKENS, inputs), (outputs, inputs), (inputs, outputs))
        x, up, down = (torch.ones(shape, dtype=dtype) for shape in shapes)

        def run() -> torch.Tensor:
            wide = functional.linear(x, up)
            return functional.linear(functional.silu(wide) * wide, down) + x

        return run

    with fast_linear(torch.float32, cpu, (outputs, inputs)):  # bfloat16 is passed on as it is
        calls = [layer(torch.float32), layer(torch.bfloat16)]
        exact, half = best_seconds(calls, rounds=50, budget_seconds=_PRECISION_BUDGET_SECONDS)
    return exact / half
