"""From gradients over the windows of each named source to those over all windows, and both to criteria."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shortstack.runtime.distributed import Process
from shortstack.scoring.criteria import BlockPass, Criterion, ScoredParameter

if TYPE_CHECKING:
    import torch


@dataclass
class SourceGradients:
    """Shows criteria the gradients of a block that a backward sweep brings, part after part of the windows.

    Attributes:
        process: this process; gradients of all are added up before criteria see them.
        scored: the scored weights of each block that is scored.
        criteria: what is shown them.
        shares: what each named source's gradient adds to the whole, in the order of the parts; empty where there is one part.
        windows: this process's.
    """

    process: Process
    scored: Mapping[int, list[ScoredParameter]]
    criteria: Sequence[Criterion]
    shares: Mapping[str, float]
    windows: int
    _seen: int = 0
    _whole: dict[str, torch.Tensor] = field(default_factory=dict)

    def on_gradients(self, index: int, weights: dict[str, torch.Tensor], gradients: dict[str, torch.Tensor]) -> None:
        """Of a block, those over the next part of the windows."""
        if index not in self.scored:
            return
        complete = self._complete(index, weights, gradients)
        if self.shares:
            source = list(self.shares)[self._seen]
            self._show([one.of_sources[source] for one in self.criteria], index, weights, complete)
            for name, gradient in complete.items():
                part = gradient * self.shares[source]
                self._whole[name] = self._whole[name].add_(part) if name in self._whole else part
            self._seen = (self._seen + 1) % len(self.shares)
            if self._seen:
                return
            complete, self._whole = self._whole, {}
        self._show(self.criteria, index, weights, complete)

    def _show(
        self,
        criteria: Sequence[Criterion],
        index: int,
        weights: dict[str, torch.Tensor],
        gradients: dict[str, torch.Tensor],
    ) -> None:
        shown = BlockPass(index, weights, self.scored[index], slice(0, self.windows), gradients=gradients)
        for criterion in criteria:
            criterion.on_block(shown)

    def _complete(
        self, index: int, weights: dict[str, torch.Tensor], gradients: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Gradients of the scored weights over the windows of all processes, which take the place of this process's."""
        complete = {}
        for name in (parameter.name for parameter in self.scored[index]):
            gradient = gradients.pop(name, None)
            if self.process.world > 1:  # one that no window of ours reaches may have reached others
                gradient = self.process.summed(
                    weights[name].new_zeros(weights[name].shape) if gradient is None else gradient
                )
            if gradient is not None:
                complete[name] = gradient
        return complete
