"""gate: the loss over gates on the blocks' updates as a quadratic model, and the sets that it holds to be the cheapest.

Removing the set S changes the loss by about -sum of g_i over S + 1/2 sum of H_ij over pairs of S, with the gradient g and the
Hessian H of the loss over the gates, all of them at 1 (arXiv 2602.00161, 2026). It is a model of small changes of the
gates, and a removal is a large one: so its best sets are measured, and what was measured ranks them.

H is the central difference of gradients, exact to about 1e-3 of its largest entry in float32. What it costs: for each block
that is removable, two settings of its gate, each run forward through the model and backward down to that block.

Legend: S sets, W windows, T tokens, N removable blocks, K blocks of a set.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from shortstack.engine.losses import loss_scale
from shortstack.runtime.workspace import append_log, load_log
from shortstack.scoring.shared_windows import SharedWindows

if TYPE_CHECKING:
    from shortstack.engine.interface import Engine, RemovalSet

STEP = 1 / 128  # of a gate: smaller ones lose more to rounding in float32 than they win
EXACT_UP_TO = 2_000_000  # sets that are all looked at
_AT_ONCE = 1 << 16
_STARTS = 64  # of the search by swaps, where there are more sets


@dataclass(frozen=True)
class QuadraticModel:
    """The loss over gates, to second order.

    Attributes:
        candidates: positions of the removable blocks.
        gradient_N, hessian_NN: of the mean NLL over their gates, float64.
    """

    candidates: tuple[int, ...]
    gradient_N: torch.Tensor
    hessian_NN: torch.Tensor

    def change(self, removed: RemovalSet) -> float:
        """By how much it holds the mean NLL to grow without a set of blocks."""
        places = [self.candidates.index(place) for place in sorted(removed)]
        return float(_changes(self.gradient_N, self.hessian_NN, torch.tensor([places]))[0]) if places else 0.0

    def cheapest(self, remove: int) -> Iterator[RemovalSet]:
        """Sets of so many blocks, the cheapest first: all up to EXACT_UP_TO, else those that a search by swaps sees."""
        count = len(self.candidates)
        if math.comb(count, remove) <= EXACT_UP_TO:
            sets = _all_sets(self.gradient_N, self.hessian_NN, remove)
        else:
            sets = _by_swaps(self.gradient_N, self.hessian_NN, remove)
        for places in sets:
            yield frozenset(self.candidates[place] for place in places)


def quadratic_model(
    engine: Engine,
    candidates: Sequence[int],
    *,
    text: SharedWindows,
    file: Path | None = None,
    key: dict[str, Any] | None = None,
    on_progress: Callable[[int], object] = lambda _: None,
) -> QuadraticModel:
    """Gradient and Hessian of the mean NLL over the gates of some blocks.

    Args:
        engine: runs the model, in float32 or wider.
        candidates: positions of the blocks.
        text: the windows of all processes, and which of their tokens count.
        file: where rows of the Hessian are kept as they come, so that a run that was killed resumes; for one process.
        key: what must agree for them to be used.
        on_progress: called with 1 for the gradient, and for each row.
    """
    windows = text.on(engine.device)
    scale_W = loss_scale(text.counts(), None)[text.place].to(engine.device)
    places = sorted(candidates)
    rows = _Rows(file, key or {})

    def gradients(settings: list[dict[int, float]]) -> torch.Tensor:
        return text.process.summed(engine.gate_gradients(windows, settings, scale_W))

    if None not in rows.known:
        rows.add(None, gradients([{}])[0].tolist())
    on_progress(1)
    for place in places:
        if place not in rows.known:
            above, below = gradients([{place: 1 + STEP}, {place: 1 - STEP}])
            rows.add(place, ((above - below) / (2 * STEP)).tolist())
        on_progress(1)
    whole_NN = torch.tensor([[rows.known[place][other] for other in places] for place in places], dtype=torch.float64)
    upper_NN = whole_NN.triu()  # a row is complete from its own block on
    gradient_N = torch.tensor([rows.known[None][place] for place in places], dtype=torch.float64)
    return QuadraticModel(tuple(places), gradient_N, upper_NN + upper_NN.triu(1).T)


class _Rows:
    """The gradient (under None) and rows of the Hessian by block, kept in a file, a line each."""

    def __init__(self, file: Path | None, key: dict[str, Any]) -> None:
        records = [] if file is None else load_log(file, key)[0]
        self.known: dict[int | None, list[float]] = {record["block"]: record["row"] for record in records}
        self._file = file

    def add(self, block: int | None, row: list[float]) -> None:
        self.known[block] = row
        if self._file is not None:
            append_log(self._file, [{"block": block, "row": row}])


def _changes(gradient_N: torch.Tensor, hessian_NN: torch.Tensor, sets_SK: torch.Tensor) -> torch.Tensor:
    pairs_SKK = hessian_NN[sets_SK[:, :, None], sets_SK[:, None, :]]
    return pairs_SKK.sum(dim=(1, 2)) / 2 - gradient_N[sets_SK].sum(dim=1)


def _all_sets(gradient_N: torch.Tensor, hessian_NN: torch.Tensor, remove: int) -> Iterable[tuple[int, ...]]:
    every = itertools.combinations(range(len(gradient_N)), remove)
    found, costs = [], []
    while some := list(itertools.islice(every, _AT_ONCE)):
        sets_SK = torch.tensor(some).reshape(len(some), remove)
        found.append(sets_SK.to(torch.int16))
        costs.append(_changes(gradient_N, hessian_NN, sets_SK))
    sets_SK = torch.cat(found)
    for number in torch.cat(costs).argsort(stable=True).tolist():
        yield tuple(sets_SK[number].tolist())


def _by_swaps(gradient_N: torch.Tensor, hessian_NN: torch.Tensor, remove: int) -> Iterable[tuple[int, ...]]:
    """All sets that were looked at on the way from many beginnings to where no swap of two blocks is cheaper."""
    count, chance = len(gradient_N), random.Random(0)
    own_N = (hessian_NN.diagonal() / 2 - gradient_N).tolist()
    starts = [tuple(sorted(range(count), key=own_N.__getitem__)[:remove])]
    starts += [tuple(chance.sample(range(count), remove)) for _ in range(_STARTS)]
    costs: dict[tuple[int, ...], float] = {}
    for start in starts:
        current, best = tuple(sorted(start)), math.inf
        while True:
            staying = [place for place in range(count) if place not in current]
            neighbours = [current, *(
                tuple(sorted({*current, new} - {old})) for old in current for new in staying
            )]  # fmt: skip
            found = _changes(gradient_N, hessian_NN, torch.tensor(neighbours)).tolist()
            costs |= dict(zip(neighbours, found, strict=True))
            cost, cheapest = min(zip(found, neighbours, strict=True))
            if not cost < best:
                break
            current, best = cheapest, cost
    yield from sorted(costs, key=lambda places: (costs[places], places))
