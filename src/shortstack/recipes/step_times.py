"""How long the steps of a run take at least: what they compute, at the rate that a matrix product reaches here now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from shortstack.benchmark.work import Work
from shortstack.checkpoint.forecast import Estimate, Passes
from shortstack.checkpoint.reader import Checkpoint
from shortstack.runtime.devices import pick_device, pick_dtype, pick_scoring_dtype

if TYPE_CHECKING:
    import torch

    from shortstack.runtime.devices import DType

UNKNOWN = "what it computes is not known beforehand"


@dataclass
class StepTimes:
    """Times of steps, with the rates that were measured for them.

    Attributes:
        rates: operations per second, by device, precision and shape of the product.
        untimed: reason -> steps that no time is known of.
    """

    rates: dict[tuple[torch.device, torch.dtype, tuple[int, int]], float] = field(default_factory=dict)
    untimed: dict[str, list[str]] = field(default_factory=dict)

    def seconds(self, step: str, estimate: Estimate, values: Mapping[str, Any]) -> float | None:
        """The least time of a step; None where it is not known, which is noted."""
        reason = estimate.untimed or ("" if estimate.passes else UNKNOWN)
        reason = reason or next((unknown for one in estimate.passes if (unknown := _work(one).unknown)), "")
        if reason:
            self.untimed.setdefault(reason, []).append(step)
            return None
        return sum(_operations(one) / self._rate(one, values, fastest=estimate.fastest) for one in estimate.passes)

    def lines(self) -> list[str]:
        """How the times were estimated, and which steps have none."""
        found = []
        if self.rates:
            rates = " and ".join(
                f"{rate / 1e9:.3g} billion operations a second in {str(dtype).removeprefix('torch.')} on {device}"
                for (device, dtype, _), rate in self.rates.items()
            )
            found.append(
                f"time: a lower bound from the matrix products alone, at the rate of one product that was measured now "
                f"({rates}); attention, imports, loading and other programs take additional time"
            )
        found += [f"no time is estimated for {', '.join(steps)}: {why}" for why, steps in self.untimed.items()]
        return found

    def _rate(self, one: Passes, values: Mapping[str, Any], *, fastest: bool) -> float:
        checkpoint, name = one.model.checkpoint, cast("DType", values.get("dtype") or "auto")
        device = pick_device(str(values.get("device") or "auto"))
        stored = checkpoint.tensors[checkpoint.anatomy.embedding].dtype
        dtype = pick_dtype(name, stored, device)
        if fastest:
            dtype = pick_scoring_dtype(name, stored, device, say=lambda _: None)
        key = (device, dtype, _largest_matrix(checkpoint))
        if key not in self.rates:
            from shortstack.benchmark.floors import product_rate

            self.rates[key] = product_rate(*key)
        return self.rates[key]


def _work(one: Passes) -> Work:
    return Work.of(one.model.checkpoint, 4)


def _largest_matrix(checkpoint: Checkpoint) -> tuple[int, int]:
    """Shape of the first block's largest matrix."""
    matrices = [tensor for tensor in checkpoint.blocks[0] if len(tensor.shape) == 2]
    largest = max(matrices, key=lambda tensor: tensor.numel, default=None)
    return (largest.shape[0], largest.shape[1]) if largest is not None else (1, 1)


def _operations(one: Passes) -> float:
    """A product and a sum for each parameter that a token goes through."""
    sizes = one.model.block_parameters()
    return 2.0 * (one.blocks * sum(sizes) / max(1, len(sizes)) + one.head * _work(one).head)
