"""What the sweeps of a scoring run give, when they are done: of all windows, or of those of one named source.

Legend: W windows, N blocks that are scored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from shortstack.runtime.devices import exact_place

if TYPE_CHECKING:
    import torch

    from shortstack.artifacts.scores import CriterionScores
    from shortstack.runtime.distributed import Process
    from shortstack.scoring.criteria import Criterion


@dataclass(frozen=True)
class Swept:
    """What the sweeps have given, when they are done.

    Attributes:
        candidates: positions of the blocks that are scored, ascending.
        blocks: their numbers in the original model.
        windows: how many windows all processes had together.
        seq_len: tokens of each.
        counted_W: how many predicted tokens of each window count.
        process: this process among those that share the windows.
        dense_nll_W, without_nll_NW: mean NLL per predicted token of each window, of the dense model and without each block;
            None where no criterion needs branches.
        others: the scores of the criteria that need no others' scores, by name.
        places: the windows that are meant, of all; None for all of them.
        source: the named source that they are from; empty for all.
    """

    candidates: tuple[int, ...]
    blocks: tuple[int, ...]
    windows: int
    seq_len: int
    counted_W: torch.Tensor
    process: Process
    dense_nll_W: torch.Tensor | None = None
    without_nll_NW: torch.Tensor | None = None
    others: Mapping[str, CriterionScores] = field(default_factory=dict)
    places: Sequence[int] | None = None
    source: str = ""

    @property
    def window_weights(self) -> torch.Tensor | None:
        """What a window's mean weighs in the mean over all tokens, 1 on average; None where all count the same number."""
        return token_weights(self.counted_W)

    def of_source(self, source: str, places: Sequence[int]) -> Swept:
        """The same of some of the windows."""
        own, dense, without = list(places), self.dense_nll_W, self.without_nll_NW
        return replace(
            self,
            counted_W=self.counted_W[own],
            dense_nll_W=None if dense is None else dense[own],
            without_nll_NW=None if without is None else without[:, own],
            places=own,
            source=source,
        )

    def of_some(self, places: Sequence[int]) -> Swept:
        """The same for some of the candidates, by their places among them."""
        nll = self.without_nll_NW
        return replace(
            self,
            candidates=tuple(self.candidates[place] for place in places),
            blocks=tuple(self.blocks[place] for place in places),
            without_nll_NW=None if nll is None else nll[list(places)],
        )

    def per_window(self, criterion: Criterion) -> torch.Tensor:
        """What a criterion has added up (`Criterion.add`), [N, W], of the windows that are meant, in their order."""
        import torch

        return self.gathered(torch.tensor([criterion.kept[index] for index in self.candidates], dtype=torch.float64))

    def gathered(self, part: torch.Tensor) -> torch.Tensor:
        """What this process has of its windows (last dimension) -> that of the windows that are meant, of all processes."""
        whole = self.process.gathered(part, self.windows)
        return whole if self.places is None else whole[..., list(self.places)]


def token_weights(counted_W: torch.Tensor) -> torch.Tensor | None:
    """What a window's mean weighs in the mean over all tokens, 1 on average; None where all count the same number."""
    if bool((counted_W == counted_W[:1]).all()):
        return None
    weights: torch.Tensor = exact_place(counted_W).double() / exact_place(counted_W).double().mean()
    return weights
