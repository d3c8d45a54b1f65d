"""Dense and pruned model side by side, from cut to cut: what is lacking is fitted, judged by the loss, and made good.

The windows go through both models block by block. Before a cut the sums of the first windows give the candidates; the others
(validation windows) go on with each of them to the end of the pruned model, and the loss there chooses. Then all windows go
on with the chosen one to the next cut. So a later cut is fitted on what the repairs before it really give.

Legend: S streams, W windows, T tokens, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from shortstack.artifacts.results import perplexity
from shortstack.common.progress import Progress
from shortstack.engine.states import States, Written, nll_from
from shortstack.errors import ShortstackError
from shortstack.pruning.repair.fit import (
    Map,
    Sums,
    linear_map,
    magnitude_ratio,
    nearest_factor,
    unconstrained_map,
)
from shortstack.pruning.repair.folds import Fold
from shortstack.pruning.repair.places import Place

NONE = "none"
# Ridges that are tried, as shares of the features' mean square.
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
_TRIED = 2  # of a method's ridges, by the loss
_STREAMS = 6  # of validation windows that go on together
_UNCONSTRAINED = "unconstrained"


@dataclass(frozen=True)
class Candidate:
    """A repair that could be made.

    Attributes:
        method: `scale`, `linear`, `full` or `none`; `unconstrained` can be measured and not be folded.
        map: what it does.
        ridge: that it was fitted with; None without one.
    """

    method: str
    map: Map
    ridge: float | None = None


@dataclass(frozen=True)
class Repaired:
    """What was done at one place.

    Attributes:
        place: where.
        chosen: the candidate that was made.
        nll: mean NLL on the validation windows with the best candidate of each method, later cuts unrepaired.
        projection_factor: as in `Fold`.
    """

    place: Place
    chosen: Candidate
    nll: dict[str, float]
    projection_factor: float = 1.0

    @property
    def fold(self) -> Fold:
        """As it goes into the weights."""
        return Fold(self.place.position, self.chosen.map, self.projection_factor)


@dataclass
class Seen:
    """What is known at one place.

    Attributes:
        sums: over the tokens that are fitted on.
        left, target: of the validation windows, the states that leave the block, and what they should be.
        features: of the same, by kind.
        projection_factor: as in `Fold`.
    """

    sums: Sums = field(default_factory=Sums)
    left: list[torch.Tensor] = field(default_factory=list)
    target: list[torch.Tensor] = field(default_factory=list)
    features: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    projection_factor: float = 1.0


@dataclass
class Repairing:
    """Two models on the same windows.

    Attributes:
        dense, pruned: their states.
        fitted_WT: which tokens maps are fitted on; none of the validation windows'.
        fitting: how many windows, the first ones, are fitted on.
        methods: what may be chosen.
        parameters: of each block of the pruned model, those that a linear map is folded into; none where it has no place.
        offset: whether they hold a bias.
    """

    dense: States
    pruned: States
    fitted_WT: torch.Tensor
    fitting: int
    methods: Sequence[str]
    parameters: Sequence[Sequence[str]]
    offset: bool
    progress: Progress

    def repaired(self, places: Sequence[Place]) -> Iterator[Repaired]:
        """Repair one place after another.

        Raises:
            ShortstackError: states are not finite.
        """
        for place in places:
            self.pruned.to(max(place.position, 0))
            self.dense.to(place.target)
            seen = self._seen(place)
            if not seen.sums.finite:
                raise ShortstackError(
                    f"{self.pruned.model.skeleton.checkpoint.source}: hidden states at {_where(place)} are not finite",
                    hint="--dtype float32; or the checkpoint is damaged: shortstack check",
                )
            candidates = self._candidates(place, seen)
            found = self._chosen(place, candidates, seen)
            self._made(found)
            yield found

    def dense_nll(self) -> torch.Tensor:
        """Mean NLL of each validation window under the dense model."""
        self.dense.to(len(self.dense.model.blocks))
        held_SWTD = self.dense.hidden_WTD[None, self.fitting :]
        return nll_from(self.dense.model, held_SWTD, self.dense.ids_WT[self.fitting :], self.dense.next)[0]

    def _seen(self, place: Place) -> Seen:
        seen = Seen()
        if place.position < 0:
            self._note(seen, slice(0, len(self.fitted_WT)), self.pruned.hidden_WTD, {})
            return seen
        with self.pruned.at_block() as block:
            for windows, written in self.pruned.written(block, self.parameters[place.position]):
                seen.projection_factor = written.factor
                self._note(seen, windows, written.left_BTD, self._features(place, written))
        return seen

    def _features(self, place: Place, written: Written) -> dict[str, torch.Tensor]:
        found = {}
        if self.parameters[place.position] and "linear" in self.methods:
            found["moved"] = written.moved_BTD
        if written.inner_BTI is not None and "full" in self.methods:
            found["inner"] = written.inner_BTI
        if "full" in self.methods and place.removed:
            found["left"] = written.left_BTD
        return found

    def _note(self, seen: Seen, windows: slice, left_BTD: torch.Tensor, features: dict[str, torch.Tensor]) -> None:
        """Add the tokens that are fitted on, and keep the validation windows."""
        fitted, target_BTD = self.fitted_WT[windows], self.dense.hidden_WTD[windows]
        rows = {kind: given[fitted] for kind, given in features.items()}
        seen.sums.add(left_BTD[fitted], target_BTD[fitted], rows)
        first = max(0, self.fitting - windows.start)  # of the validation windows among these
        if first < len(left_BTD):
            seen.left.append(left_BTD[first:].clone())
            seen.target.append(target_BTD[first:].clone())
            for kind, given in features.items():
                seen.features.setdefault(kind, []).append(given[first:].clone())

    def _candidates(self, place: Place, seen: Seen) -> list[Candidate]:
        sums, offset = seen.sums, self.offset and "inner" in seen.sums.of
        found = [Candidate(NONE, Map())]
        if "scale" in self.methods and place.removed and not place.is_last:
            ratios = dict.fromkeys((magnitude_ratio(sums), nearest_factor(sums)))
            found += [Candidate("scale", Map(factor=ratio)) for ratio in ratios if ratio > 0]
        scaled = bool(place.removed) and not place.is_last
        if "moved" in sums.of:
            found += _nearest(
                seen, "linear", lambda ridge: linear_map(sums, "moved", ridge, offset=offset, scaled=False)
            )
        if "inner" in sums.of:
            found += _nearest(
                seen, "full", lambda ridge: linear_map(sums, "inner", ridge, offset=offset, scaled=scaled)
            )
        if "left" in sums.of:
            found += _nearest(seen, _UNCONSTRAINED, lambda ridge: unconstrained_map(sums, ridge))
        return found

    def _chosen(self, place: Place, candidates: Sequence[Candidate], seen: Seen) -> Repaired:
        nll = self._losses(place, candidates, seen)
        if not math.isfinite(nll[0]):
            raise ShortstackError(
                f"{self.pruned.model.skeleton.checkpoint.source}: its loss on the validation windows is {nll[0]}",
                hint="--dtype float32; or the checkpoint is damaged: shortstack check",
            )
        best: dict[str, tuple[float, Candidate]] = {}
        for loss, candidate in zip(nll, candidates, strict=True):
            if loss < best.get(candidate.method, (float("inf"), None))[0]:
                best[candidate.method] = (loss, candidate)
        allowed = [best[method] for method in self.methods if method in best] or [best[NONE]]
        chosen = min(allowed, key=lambda one: one[0])[1]
        return Repaired(place, chosen, {method: loss for method, (loss, _) in best.items()}, seen.projection_factor)

    def _losses(self, place: Place, candidates: Sequence[Candidate], seen: Seen) -> list[float]:
        """Mean NLL on the validation windows with each candidate."""
        left_WTD = torch.cat(seen.left)
        features = {kind: torch.cat(parts) for kind, parts in seen.features.items()}
        ids_WT = self.pruned.ids_WT[self.fitting :]
        found: list[float] = []
        for start in range(0, len(candidates), _STREAMS):
            some = candidates[start : start + _STREAMS]
            held_SWTD = left_WTD.new_empty((len(some), *left_WTD.shape))
            for number, candidate in enumerate(some):
                held_SWTD[number] = candidate.map(left_WTD, features.get(candidate.map.features))
            found += nll_from(self.pruned.model, held_SWTD, ids_WT, place.position + 1).mean(dim=1).tolist()
        return found

    def _made(self, found: Repaired) -> None:
        """Take all windows on, with the repair."""
        place, done, states = found.place, found.chosen.map, self.pruned
        if place.position < 0:
            states.hidden_WTD *= done.factor
            return
        if not done.features:
            states.to(place.position + 1)
            states.hidden_WTD *= done.factor
            return
        with states.at_block() as block:
            for windows, written in states.written(block, self.parameters[place.position]):
                features = {"moved": written.moved_BTD, "inner": written.inner_BTI}[done.features]
                states.hidden_WTD[windows] = done(written.left_BTD, features)
        states.next = place.position + 1


def _nearest(seen: Seen, method: str, fit: Callable[[float], Map]) -> list[Candidate]:
    """The map whose states are nearest to the target on the validation windows, and the one with the next stronger ridge.

    Every token counts the same, however large its states are; the first ones, which are hundreds of times as large, do not.
    """
    candidates = [Candidate(method, fit(ridge), ridge) for ridge in RIDGES]
    apart = [_distance(seen, candidate.map) for candidate in candidates]
    best = min(range(len(apart)), key=lambda number: apart[number])
    return candidates[best : best + _TRIED]


def _distance(seen: Seen, fitted: Map) -> float:
    total = 0.0
    for number, (left, target) in enumerate(zip(seen.left, seen.target, strict=True)):
        features = seen.features[fitted.features][number]
        apart = (fitted(left, features)[:, 1:].float() - target[:, 1:].float()).square().sum(dim=-1)
        total += float((apart / target[:, 1:].float().square().sum(dim=-1).clamp_min(1e-30)).sum())
    return total


def described(found: Repaired) -> str:
    """A line: what each method gives at a place, and what was chosen."""
    shown = ", ".join(f"{method} {perplexity(nll):.4g}" for method, nll in found.nll.items())
    return f"{_where(found.place)}: perplexity {shown}: {found.chosen.method}"


def _where(place: Place) -> str:
    return f"the cut of {place.name}" if place.removed else f"block {place.block}, behind a cut"
