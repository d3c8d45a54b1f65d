"""What the machine reaches in this very run: memory bandwidth and matrix products; and the time that they allow at best."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from shortstack.benchmark.timing import best_seconds
from shortstack.benchmark.work import Work
from shortstack.runtime.memory import available_bytes
from shortstack.runtime.private_names import has_onednn, onednn_product
from shortstack.runtime.stopwatch import now

if TYPE_CHECKING:
    from shortstack.benchmark.engines import Workload

_ROWS = 1024  # of a product: enough for the best rate
_ROUNDS = 5
_ENOUGH_OPERATIONS, _MOST_TIMES = 10e9, 20  # of one round of measurements of a rate
_MOST_BYTES = {"cpu": 1 << 30, "cuda": 4 << 30}
_WIDEST = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True)
class Machine:
    """What was measured.

    Attributes:
        bytes_per_second: the best rate at which memory of the size of the weights is read.
        operations_per_second: the best rate of a matrix product in the model's precision.
    """

    bytes_per_second: float
    operations_per_second: float

    def best_of(self, other: Machine) -> Machine:
        """The better of two measurements: a floor must not be above what the machine can do."""
        return Machine(
            max(self.bytes_per_second, other.bytes_per_second),
            max(self.operations_per_second, other.operations_per_second),
        )

    def prefill_seconds(self, work: Work, workload: Workload) -> float:
        """The least time until the first token: the operations of the prompts, or reading every weight once."""
        return max(
            work.prefill_operations(workload) / self.operations_per_second, work.weight_bytes / self.bytes_per_second
        )

    def step_seconds(self, work: Work, workload: Workload) -> float:
        """The least time of one further token of every sequence: reading weights and cache, or the operations."""
        return max(
            work.step_bytes(workload) / self.bytes_per_second,
            work.step_operations(workload) / self.operations_per_second,
        )


@torch.no_grad()
def measured_machine(device: torch.device, dtype: torch.dtype, weight_bytes: int) -> Machine:
    """Measure the machine as it is now: some tenths of a second on a CPU."""
    wide = _WIDEST.get(device.type, _WIDEST["cpu"])
    rate = product_rate(device, dtype, (wide, wide))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    most = _MOST_BYTES.get(device.type, _MOST_BYTES["cpu"])
    most = min(most, available_bytes(device) // 4)  # beside models that fill the rest
    elements = max(1 << 18, min(weight_bytes, most) // dtype.itemsize)
    columns = min(wide, 2048)
    matrix = torch.ones(-(-elements // columns), columns, device=device, dtype=dtype)
    vector = torch.ones(columns, device=device, dtype=dtype)
    reading = _best([lambda: torch.mv(matrix, vector), lambda: matrix.sum()], device)
    return Machine(matrix.nbytes / reading, rate)


@torch.no_grad()
def product_rate(device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> float:
    """The best rate of a product with a matrix of this shape, in operations per second: a product and a sum are two.

    Small products are repeated for some tenths of a second: other programs disturb single ones.
    """
    outputs, inputs = shape
    x, weight = (torch.ones(rows, inputs, device=device, dtype=dtype) for rows in (_ROWS, outputs))
    calls = [lambda: torch.mm(x, weight.t()), *_onednn_product(x, weight)]
    rounds = max(1, min(_MOST_TIMES, round(_ENOUGH_OPERATIONS / (2 * _ROWS * outputs * inputs))))
    seconds = min(_best(calls, device) for _ in range(rounds))
    return 2 * _ROWS * outputs * inputs / seconds


def _onednn_product(x: torch.Tensor, weight: torch.Tensor) -> list[Callable[[], object]]:
    """The other library in torch, which is the faster one on some CPUs."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or not has_onednn():
        return []
    return [lambda: onednn_product(x, weight, None)]


def _best(calls: list[Callable[[], object]], device: torch.device) -> float:
    rounds = _ROUNDS if device.type == "cpu" else 2 * _ROUNDS
    return min(best_seconds(calls, rounds=rounds, clock=functools.partial(now, device)))
