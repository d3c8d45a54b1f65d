"""Sets of blocks, measured: the losses of the model without them, each computed once, and kept in a file as they come.

A search asks for what it needs and gets what is known already at once: so one that was killed runs again from its beginning,
finds everything in the file, and resumes where it was.

Legend: S sets, W windows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from shortstack.engine.interface import Windows
from shortstack.runtime.distributed import Process
from shortstack.runtime.workspace import append_log, load_log, unused
from shortstack.scoring.criteria.windows_mean import mean_and_error
from shortstack.scoring.shared_windows import SharedWindows
from shortstack.scoring.swept import token_weights

if TYPE_CHECKING:
    from shortstack.engine.interface import Engine, RemovalSet


@dataclass
class MeasuredSets:
    """Mean NLL per predicted token of each window, without each requested set of blocks.

    Several processes share the windows, and all get the losses of all windows.

    Attributes:
        engine: runs the model.
        text: the windows of all processes, of which each has its share.
        file: where losses are kept; None keeps them in memory alone. For one process.
        key: what must agree for the losses in the file to be used.
        on_progress: called with the number of block evaluations just done.
        say: reports that losses of another key are in the file.
        evaluations: block evaluations so far, a window through a block, by this process in this run.
        own: this process's share of the windows.
    """

    engine: Engine
    text: SharedWindows
    file: Path | None = None
    key: dict[str, Any] = field(default_factory=dict)
    on_progress: Callable[[int], object] = lambda _: None
    say: Callable[[str], object] = lambda _: None
    evaluations: int = 0
    own: Windows = field(init=False)
    _known: dict[RemovalSet, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.own = self.text.on(self.engine.device)
        if self.file is None:
            return
        records, differs = load_log(self.file, self.key)
        self._known = {frozenset(record["blocks"]): record["nll"] for record in records}
        if differs:
            self.say(unused(self.file, differs))

    @property
    def windows(self) -> int:
        """How many all processes have together."""
        return len(self.text.ids)

    @property
    def process(self) -> Process:
        """This process among them."""
        return self.text.process

    @property
    def known(self) -> int:
        """How many sets have been measured."""
        return len(self._known)

    def nll(self, sets: Iterable[RemovalSet], windows: int | None = None) -> torch.Tensor:
        """Mean NLL per predicted token, [S, W], float64; in every process the same.

        Args:
            sets: positions of the blocks that are bypassed.
            windows: the first so many windows alone; all by default. One process.
        """
        asked, most = list(sets), self.windows if windows is None else windows
        missing: dict[int, list[RemovalSet]] = {}  # by how many of their windows are known
        for removed in dict.fromkeys(asked):
            known = len(self._known.get(removed, ()))
            if known < most:
                missing.setdefault(known, []).append(removed)
        for first, group in missing.items():
            self._measure(group, first, most)
        found = [self._known[removed][:most] for removed in asked]
        return torch.tensor(found, dtype=torch.float64).reshape(len(asked), most)

    def means(self, nll_SW: torch.Tensor) -> torch.Tensor:
        """The mean NLL over all predicted tokens that count, [S], of as many of the first windows as there are losses."""
        return mean_and_error(nll_SW, self.weights(nll_SW.shape[1]))[0]

    def weights(self, windows: int) -> torch.Tensor | None:
        """What each of the first so many windows weighs in a mean over tokens; None where all weigh the same."""
        return token_weights(self._counts(windows))

    def of_sources(self, nll_SW: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
        """By named source, losses of its windows among the first of all, and what each window weighs (None: the same)."""
        windows = nll_SW.shape[1]
        found = {}
        for source, places in self.text.sources.items():
            own = [place for place in places if place < windows]
            if own:
                found[source] = (nll_SW[:, own], token_weights(self._counts(windows)[own]))
        return found

    def _counts(self, windows: int) -> torch.Tensor:
        return torch.tensor(self.text.counts()[:windows])

    def nll_after_one_token(self) -> torch.Tensor:
        """Mean NLL of each window's tokens where the dense model sees the one before alone, [W]; every second token."""
        windows, seq_len = self.own.ids_WT.shape
        pairs = Windows(self.own.ids_WT[:, : seq_len // 2 * 2].reshape(-1, 2))
        nll_W = self.engine.nll_without(pairs, [frozenset()])[0].view(windows, -1).mean(dim=1)
        return self.process.gathered(nll_W, self.windows)

    def _measure(self, sets: Sequence[RemovalSet], first: int, most: int) -> None:
        part = self.own if self.process.world > 1 else self.own[first:most]

        def counted(streams: int) -> None:
            self.evaluations += streams * len(part)
            self.on_progress(streams * len(part))

        nll_SW = self.process.gathered(self.engine.nll_without(part, sets, counted), self.windows)
        for removed, values in zip(sets, nll_SW.tolist(), strict=True):
            self._known[removed] = [*self._known.get(removed, ()), *values]
        if self.file is not None:
            append_log(self.file, [{"blocks": sorted(one), "nll": self._known[one]} for one in sets])
