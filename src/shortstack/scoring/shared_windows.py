"""The windows that a scoring run is on: of which named source each is, which tokens count, and this process's share of them.

Legend: W windows, T tokens.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from shortstack.common.json_text import json_text
from shortstack.runtime.distributed import ALONE, Process

if TYPE_CHECKING:
    import torch

    from shortstack.engine.interface import Windows


@dataclass(frozen=True)
class SharedWindows:
    """Windows of token ids that several processes share.

    Attributes:
        ids: of all processes.
        process: this process.
        sources: the places of the windows of each named source, side by side; none where the text has one source.
        counted: which tokens of each window count in its loss; None for all that are predicted.
    """

    ids: Sequence[Sequence[int]]
    process: Process = ALONE
    sources: Mapping[str, Sequence[int]] = field(default_factory=dict)
    counted: Sequence[Sequence[bool]] | None = None

    @property
    def seq_len(self) -> int:
        """Tokens of each."""
        return len(self.ids[0])

    @property
    def place(self) -> slice:
        """Which are this process's."""
        return self.process.part(len(self.ids))

    @property
    def own(self) -> Sequence[Sequence[int]]:
        """This process's."""
        return self.ids[self.place]

    @property
    def sha256(self) -> str:
        """Of all that makes figures of them."""
        return hashlib.sha256(json_text([self.own, self.sources, self.counted]).encode()).hexdigest()

    def some(self, windows: slice) -> SharedWindows:
        """Some of them, of which processes have their shares again; for text of one source."""
        return replace(self, ids=self.ids[windows], counted=None if self.counted is None else self.counted[windows])

    def on(self, device: torch.device) -> Windows:
        """This process's, as an engine takes them."""
        import torch

        from shortstack.engine.interface import Windows

        counted = None if self.counted is None else torch.tensor([*self.counted[self.place]], device=device)
        return replace(Windows.of(self.own, device), counted_WT=counted, parts=self.parts())

    def counts(self) -> list[int]:
        """How many predicted tokens of each window count; the first token of all is never predicted."""
        if self.counted is None:
            return [self.seq_len - 1] * len(self.ids)
        return [sum(one[1:]) for one in self.counted]

    def parts(self) -> list[slice] | None:
        """Of each named source the windows among this process's; None where there is one source."""
        if not self.sources:
            return None
        held = range(self.place.start, self.place.stop)
        starts = [bisect.bisect_left(held, places[0]) for places in self.sources.values()]
        return [slice(start, stop) for start, stop in itertools.pairwise([*starts, len(held)])]

    def loss_scale(self, batch: int | None) -> tuple[torch.Tensor, dict[str, float]]:
        """What this process's windows' losses are multiplied by, and the share of each named source's gradient in the whole.

        A source's gradient is that of its own mean loss, or the sum of those of its own batches.

        Args:
            batch: windows per batch, each with its own mean loss; None for one mean over all.
        """
        import torch

        from shortstack.engine.losses import loss_scale

        counts = self.counts()
        if not self.sources:
            return loss_scale(counts, batch)[self.place], {}
        of_sources = {name: [counts[place] for place in places] for name, places in self.sources.items()}
        scale_W = torch.cat([loss_scale(of_source, batch) for of_source in of_sources.values()])
        shares = {name: sum(one) / sum(counts) if batch is None else 1.0 for name, one in of_sources.items()}
        return scale_W[self.place], shares
