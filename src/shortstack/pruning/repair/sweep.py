"""Repairs fitted from cut to cut, with the dense and the pruned model side by side, and chosen by the loss.

The windows go through both models block by block. Before a cut the sums of the first windows give the candidates; each map
is fitted twice, with the first token of each window, whose states are unlike all others, and without it. The other windows
(validation windows) are run with each candidate to the end of the pruned model, and the loss there chooses. A quarter of them
chooses between the candidates of one method; the rest is run with the chosen ones only. Then all windows continue with the
chosen repair to the next cut. So a later cut is fitted on the output of the repairs before it.

Legend: S streams, W windows, T tokens, D hidden size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from shortstack.artifacts.results import perplexity
from shortstack.common.progress import Progress
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
from shortstack.pruning.repair.options import SCREENED, TRIED
from shortstack.pruning.repair.places import Place
from shortstack.pruning.repair.states import States, Written, nll_from

NONE = "none"
# Ridges that are tried, as shares of the features' mean square.
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
_STREAMS = 6  # of validation windows that are run together
_UNCONSTRAINED = "unconstrained"


@dataclass(frozen=True)
class Candidate:
    """A repair that could be made.

    Attributes:
        method: `scale`, `linear`, `full` or `none`; `unconstrained` can be measured and not be folded.
        map: what it does.
        ridge: that it was fitted with; None without one.
        first_token: whether it was fitted on the first token of each window, too.
    """

    method: str
    map: Map
    ridge: float | None = None
    first_token: bool = False


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
        sums: over each part of the tokens that are fitted on.
        left, target: of the validation windows, the states that leave the block, and what they should be.
        features: of the same, by kind.
        projection_factor: as in `Fold`.
    """

    sums: list[Sums]
    left: list[torch.Tensor] = field(default_factory=list)
    target: list[torch.Tensor] = field(default_factory=list)
    features: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    projection_factor: float = 1.0

    def joined(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The states of all validation windows, and their features by kind."""
        return torch.cat(self.left), {kind: torch.cat(parts) for kind, parts in self.features.items()}


@dataclass
class Repairing:
    """Two models on the same windows.

    Attributes:
        dense, pruned: their states.
        fitted_WT: which tokens maps are fitted on; none of the validation windows'. Of several parts maps are fitted on the
            first, then on the first and the second, and so on.
        fitting: how many windows, the first ones, are fitted on.
        methods: what may be chosen.
        parameters: of each block of the pruned model, those that a linear map is folded into; none where it has no place.
        offset: whether they hold a bias.
    """

    dense: States
    pruned: States
    fitted_WT: Sequence[torch.Tensor]
    fitting: int
    methods: Sequence[str]
    parameters: Sequence[Sequence[str]]
    offset: bool
    progress: Progress
    so_far: torch.Tensor | None = field(
        default=None, init=False
    )  # NLL of each validation window with what was made good

    def repaired(self, places: Sequence[Place]) -> Iterator[Repaired]:
        """Repair one place after another.

        Raises:
            ShortstackError: states are not finite.
        """
        for place in places:
            self.pruned.to(max(place.position, 0))
            self.dense.to(place.target)
            seen = self._seen(place)
            if not all(sums.finite for sums in seen.sums):
                raise ShortstackError(
                    f"{self.pruned.model.skeleton.checkpoint.source}: hidden states at {_where(place)} are not finite",
                    hint="use --dtype float32; if it fails too, the checkpoint is damaged (shortstack check)",
                )
            candidates = self._candidates(place, seen)
            found = self._chosen(place, candidates, seen)
            self._made(found)
            yield found

    def dense_nll(self) -> torch.Tensor:
        """Mean NLL of each validation window under the dense model."""
        self.dense.to(len(self.dense.model.blocks))
        held_SWTD = self.dense.hidden_WTD[None, self.fitting :]
        return nll_from(self.dense.model, held_SWTD, self.dense.windows[self.fitting :], self.dense.next)[0]

    def _seen(self, place: Place) -> Seen:
        seen = Seen([Sums(scaled=_is_scaled(place)) for _ in self.fitted_WT])
        if place.position < 0:
            self._note(seen, slice(0, len(self.pruned.hidden_WTD)), self.pruned.hidden_WTD, {})
            return seen
        with self.pruned.at_block() as block:
            for windows, written in self.pruned.written(block, self.parameters[place.position]):
                seen.projection_factor = written.factor
                self._note(seen, windows, written.left_BTD, self._features(place, written))
        return seen

    def _features(self, place: Place, written: Written) -> dict[str, torch.Tensor]:
        found = {}
        if written.inner_BTI is not None and "full" in self.methods:
            found["inner"] = written.inner_BTI
        # Behind a cut the projection that is refitted can do everything that a map of its output does.
        mapped = "linear" in self.methods and (place.removed or "inner" not in found)
        if self.parameters[place.position] and mapped:
            found["moved"] = written.moved_BTD
        if tuple(self.methods) == ("full",) and place.removed:
            found["left"] = written.left_BTD
        return found

    def _note(self, seen: Seen, windows: slice, left_BTD: torch.Tensor, features: dict[str, torch.Tensor]) -> None:
        """Add the tokens that are fitted on, and keep the validation windows."""
        target_BTD = self.dense.hidden_WTD[windows]
        for sums, tokens_WT in zip(seen.sums, self.fitted_WT, strict=True):
            chosen = tokens_WT[windows]
            rows = {kind: given[chosen] for kind, given in features.items()}
            sums.add(left_BTD[chosen], target_BTD[chosen], rows)
        first = max(0, self.fitting - windows.start)  # of the validation windows among these
        if first < len(left_BTD):
            seen.left.append(left_BTD[first:].clone())
            seen.target.append(target_BTD[first:].clone())
            for kind, given in features.items():
                seen.features.setdefault(kind, []).append(given[first:].clone())

    def _candidates(self, place: Place, seen: Seen) -> list[Candidate]:
        found = [Candidate(NONE, Map())]
        parts = itertools.accumulate(self.fitted_WT, torch.logical_or)
        for sums, tokens_WT in zip(itertools.accumulate(seen.sums, Sums.and_of), parts, strict=True):
            found += self._fitted_on(sums, place, seen, bool(tokens_WT[:, 0].any()))
        return found

    def _fitted_on(self, sums: Sums, place: Place, seen: Seen, first_token: bool) -> list[Candidate]:
        """What some tokens give, the first ones of the windows among them or not."""
        offset, found = self.offset and "inner" in sums.of, []
        if "scale" in self.methods and _is_scaled(place):
            ratios = dict.fromkeys((magnitude_ratio(sums), nearest_factor(sums)))
            found += [Candidate("scale", Map(factor=ratio)) for ratio in ratios if ratio > 0]
        if "moved" in sums.of:
            found += _nearest(
                seen, "linear", lambda ridge: linear_map(sums, "moved", ridge, offset=offset, scaled=False)
            )
        if "inner" in sums.of:
            found += _nearest(
                seen, "full", lambda ridge: linear_map(sums, "inner", ridge, offset=offset, scaled=sums.scaled)
            )
        if "left" in sums.of:
            found += _nearest(seen, _UNCONSTRAINED, lambda ridge: unconstrained_map(sums, ridge))[:1]
        return [replace(candidate, first_token=first_token) for candidate in found]

    def _chosen(self, place: Place, candidates: Sequence[Candidate], seen: Seen) -> Repaired:
        losses = self._losses(place, candidates, seen)
        nll = {method: float(of_windows.mean()) for method, (_, of_windows) in losses.items()}
        if not math.isfinite(nll[NONE]):
            raise ShortstackError(
                f"{self.pruned.model.skeleton.checkpoint.source}: its loss on the validation windows is {nll[NONE]}",
                hint="use --dtype float32; if it fails too, the checkpoint is damaged (shortstack check)",
            )
        allowed = [method for method in self.methods if math.isfinite(nll.get(method, math.inf))] or [NONE]
        chosen, self.so_far = losses[min(allowed, key=lambda method: nll[method])]
        return Repaired(place, chosen, nll, seen.projection_factor)

    def _losses(
        self, place: Place, candidates: Sequence[Candidate], seen: Seen
    ) -> dict[str, tuple[Candidate, torch.Tensor]]:
        """The best candidate of each method, with its NLL of each validation window; some windows alone choose among several.

        What the loss is without a repair is known where one was chosen before: nothing has changed since.
        """
        left_WTD, features = seen.joined()
        few = slice(0, max(1, len(left_WTD) // SCREENED))
        rest = slice(few.stop, len(left_WTD))
        unknown = [one for one in candidates if one.method != NONE or self.so_far is None]
        first = self._nll(place, unknown, left_WTD, features, few)
        best: dict[str, tuple[Candidate, torch.Tensor]] = {}
        for candidate, of_windows in zip(unknown, first, strict=True):
            known = best.get(candidate.method)
            if known is None or not float(known[1].mean()) <= float(of_windows.mean()):  # NaN is worse than all
                best[candidate.method] = (candidate, of_windows)
        kept = [candidate for candidate, _ in best.values()]
        further = self._nll(place, kept, left_WTD, features, rest)
        found = {
            one.method: (one, torch.cat([best[one.method][1], of_windows]))
            for one, of_windows in zip(kept, further, strict=True)
        }
        return found if self.so_far is None else {NONE: (candidates[0], self.so_far), **found}

    def _nll(
        self,
        place: Place,
        candidates: Sequence[Candidate],
        left_WTD: torch.Tensor,
        features: Mapping[str, torch.Tensor],
        windows: slice,
    ) -> list[torch.Tensor]:
        """NLL of some validation windows with each candidate."""
        own_WTD, own = left_WTD[windows], {kind: given[windows] for kind, given in features.items()}
        run = self.pruned.windows[self.fitting :][windows]
        found: list[torch.Tensor] = []
        for start in range(0, len(candidates), _STREAMS):
            some = candidates[start : start + _STREAMS]
            held_SWTD = own_WTD.new_empty((len(some), *own_WTD.shape))
            for number, candidate in enumerate(some):
                held_SWTD[number] = candidate.map(own_WTD, own.get(candidate.map.features))
            found += nll_from(self.pruned.model, held_SWTD, run, place.position + 1)
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


def _is_scaled(place: Place) -> bool:
    """Whether a factor does something there: at a cut with blocks behind it."""
    return bool(place.removed) and not place.is_last


def _nearest(seen: Seen, method: str, fit: Callable[[float], Map]) -> list[Candidate]:
    """The map whose states are nearest to the target on the validation windows, and the one with the next stronger ridge.

    Every token counts the same, however large its states are; the first ones, which are hundreds of times as large, do not.
    """
    candidates = [Candidate(method, fit(ridge), ridge) for ridge in RIDGES]
    apart = [_distance(seen, candidate.map) for candidate in candidates]
    best = min(range(len(apart)), key=lambda number: apart[number])
    return candidates[best : best + TRIED]


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
