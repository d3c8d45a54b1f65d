"""Searches for the cheapest set of blocks, on an opened model: what `search` and `curve` share.

Legend: S sets, W windows.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shortstack.artifacts.results import perplexity
from shortstack.checkpoint.drop_blocks import reason_against
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.formatting import named_blocks, ranges
from shortstack.common.progress import Progress
from shortstack.errors import ShortstackError
from shortstack.pruning.budget import ceiling_nll
from shortstack.pruning.gate_search import GateSearch, gate_sets
from shortstack.pruning.objective import Objective
from shortstack.pruning.plan import first_that_may_go
from shortstack.pruning.rescoring import Rescoring
from shortstack.pruning.selection import Selection
from shortstack.pruning.source_costs import judged_change, objective_costs

if TYPE_CHECKING:
    import torch

    from shortstack.engine.interface import RemovalSet
    from shortstack.scoring.search.beam import Ranked
    from shortstack.scoring.search.measured_sets import MeasuredSets


@dataclass(frozen=True)
class Judged:
    """What the model costs without a set of blocks, on windows that chose nothing, beside the dense model.

    Attributes:
        by: what chose the set.
        removed: blocks of the original model.
        ppl: perplexity without them.
        increase: how much larger than the dense model's it is, as a share of that.
        stderr: standard error of the increase, over windows, paired; None for a single window.
        sources: the same (`ppl`, `increase`, `stderr`) of each named source.
    """

    by: str
    removed: tuple[int, ...]
    ppl: float
    increase: float
    stderr: float | None
    sources: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return {**vars(self), "removed": list(self.removed), "sources": dict(self.sources)}


@dataclass
class SetSearch:
    """Searches on one opened model.

    Attributes:
        free: positions of the removable blocks.
        choosing, judging: measure sets, on the windows that choose and on the others.
        objective: what sets are chosen for, where the text has named sources; None for the loss over all tokens.
        refused: sets that cannot go exactly, and why.
        told: the best sets of steps that were told of: a step that is taken again is not.
        gates: what the gates say, once a search by gates has asked.
        rescoring: chooses by scores of what is left, in place of measured losses.
    """

    checkpoint: Checkpoint
    selection: Selection
    free: Sequence[int]
    choosing: MeasuredSets
    judging: MeasuredSets
    progress: Progress
    objective: Objective | None = None
    refused: dict[RemovalSet, str] = field(default_factory=dict)
    told: set[RemovalSet] = field(default_factory=set)
    gates: GateSearch | None = None
    rescoring: Rescoring | None = None

    def order(self) -> list[int]:
        """The removable blocks, by what each costs alone, the cheapest first."""
        costs = self.costs([frozenset(), *(frozenset({place}) for place in self.free)])[1:]
        return [
            self.free[number] for number in sorted(range(len(self.free)), key=lambda number: (costs[number], number))
        ]

    def costs(self, sets: Collection[RemovalSet]) -> list[float]:
        """What each set costs on the windows that choose: the mean NLL without it, or the objective's value."""
        found: list[float] = self._cost(sets).tolist()
        return found

    def _cost(self, sets: Collection[RemovalSet], windows: int | None = None) -> torch.Tensor:
        """The same on the first so many windows, [S]."""
        nll_SW = self.choosing.nll(sets, windows)
        if self.objective is None:
            return self.choosing.means(nll_SW)
        return objective_costs(self.objective, self.choosing, nll_SW, self.choosing.nll([frozenset()], windows))

    def losses(self, sets: Collection[RemovalSet]) -> list[float]:
        """The mean NLL without each set on the windows that choose, whatever the objective."""
        found: list[float] = self.choosing.means(self.choosing.nll(sets)).tolist()
        return found

    def added_up(self, removed: RemovalSet) -> float:
        """What the perplexity would grow by, as a share, if each block of a set cost what it costs alone."""
        dense, *alone = self.losses([frozenset(), *(frozenset({place}) for place in sorted(removed))])
        return math.expm1(sum(alone) - len(alone) * dense)

    def one_shot(self, wanted: int) -> RemovalSet:
        """The blocks that cost least one by one."""
        return self.first_of(self.order(), wanted)

    def first_of(self, order: Sequence[int], wanted: int) -> RemovalSet:
        """So many blocks of an order, the first that can be removed together."""
        blocks = self.checkpoint.original_blocks
        removed, passed_by = first_that_may_go(self.checkpoint, [blocks[place] for place in order], wanted)
        if passed_by:
            self.reason_against(frozenset(order[:wanted]))
        return frozenset(self.checkpoint.position_of(block) for block in removed)

    def ranked(self, wanted: int) -> list[RemovalSet]:
        """Sets of that many blocks, the chosen one first.

        Raises:
            ShortstackError: no such set can be removed exactly.
        """
        if self.selection.kind == "one-shot" or not wanted:
            return [self.one_shot(wanted)]
        if self.selection.kind == "contiguous":
            return self._runs(wanted)
        if self.selection.kind == "evolution":
            return list(self._evolved(self.one_shot(wanted)).sets)
        if self.selection.kind == "swaps":
            return list(self._evolved(self._grown(wanted, 1)[0]).sets)
        if self.selection.kind == "gate":
            return gate_sets(self, wanted)
        if self.rescoring is not None:
            return [frozenset(self.checkpoint.position_of(block) for block in self.rescoring.first(wanted))]
        return self._grown(wanted, self.selection.number)

    def most_under(self, ceiling: str, limit: int) -> int:
        """How many blocks can be removed under a perplexity ceiling: as long as the chosen set stays below it.

        Args:
            ceiling: such as `12.5`, or `1.2x` for 1.2 times the dense model's.
            limit: the most blocks.

        Raises:
            ShortstackError: no set keeps it.
        """
        dense = self.losses([frozenset()])[0]
        most_nll, found, least = ceiling_nll(ceiling, dense), 0, None
        for size in range(1, limit + 1):
            try:
                chosen = self.ranked(size)[0]
            except ShortstackError:  # of this size no set is removable; of a larger one some may be
                continue
            cost = self.losses([chosen])[0]
            least = least or f"; without {named_blocks(self.blocks(chosen))} it is {perplexity(cost):.4g}"
            if cost > most_nll:
                break
            found = size
        if not found:
            raise ShortstackError(
                f"--ppl-ceiling {ceiling}: no set of blocks of {self.checkpoint.source} has a perplexity of at most "
                f"{perplexity(most_nll):.4g} (the dense model's is {perplexity(dense):.4g}{least or ''})",
                hint="set a higher ceiling" + ("" if self.selection.kind == "beam" else ", or --selection beam:4"),
            )
        return found

    def steps(self, most: int, width: int | None = None) -> list[Ranked]:
        """The sets of 1, 2, ... `most` blocks that a beam sees; by default it is as wide as the selection says."""
        from shortstack.scoring.search.beam import beam

        return beam(
            self._cost,
            self.free,
            most,
            width=width or self.selection.number,
            reason_against=self.reason_against,
            on_step=self._say_step,
        )

    def judged(self, sets: Mapping[str, RemovalSet]) -> tuple[float, list[Judged]]:
        """The dense model's perplexity on windows that chose nothing, and there what each set costs, by its name."""
        dense_W, *nll_SW = self.judging.nll([frozenset(), *sets.values()])
        found = []
        for (name, removed), nll_W in zip(sets.items(), nll_SW, strict=True):
            whole, sources = judged_change(self.judging, nll_W, dense_W)
            found.append(Judged(name, self.blocks(removed), **whole, sources=sources))
        return perplexity(float(self.judging.means(dense_W[None])[0])), found

    def say_refused(self) -> None:
        """How many sets were skipped, and why."""
        if self.refused:
            one, why = next(iter(self.refused.items()))
            self.progress.say(
                f"{len(self.refused)} sets of blocks cannot be removed exactly and were not measured, such as "
                f"{ranges(self.blocks(one))}: {why}"
            )

    def blocks(self, removed: Collection[int]) -> tuple[int, ...]:
        """Numbers in the original model, of positions."""
        return tuple(self.checkpoint.original_blocks[place] for place in sorted(removed))

    def _runs(self, wanted: int) -> list[RemovalSet]:
        free = set(self.free)
        runs = [frozenset(range(first, first + wanted)) for first in range(self.checkpoint.depth - wanted + 1)]
        possible = [run for run in runs if run <= free and self.reason_against(run) is None]
        if not possible:
            raise ShortstackError(
                f"{self.checkpoint.source}: no run of {wanted} adjacent blocks can be removed",
                hint="remove fewer, --no-plus, or --selection greedy",
            )
        costs = self.costs(possible)
        return [possible[place] for place in sorted(range(len(possible)), key=lambda place: (costs[place], place))]

    def _grown(self, wanted: int, width: int) -> list[RemovalSet]:
        """The sets of so many blocks that a beam sees, the cheapest first.

        Raises:
            ShortstackError: no such set can be removed exactly.
        """
        steps = self.steps(wanted, width)
        if len(steps) < wanted or not steps[-1].sets:
            why = next(iter(steps[-1].skipped.values()), "")
            raise ShortstackError(
                f"{self.checkpoint.source}: no {wanted} blocks can be removed exactly: {why}",
                hint="remove fewer blocks",
            )
        return list(steps[-1].sets)

    def _evolved(self, start: RemovalSet) -> Ranked:
        """The sets that swaps of blocks make of one set, and that set, the cheapest first."""
        from shortstack.scoring.search.evolution import Evolution, evolve

        def say(number: int, best: RemovalSet, cost: float) -> None:
            self.progress.say(f"generation {number + 1}: {ranges(self.blocks(best))}, {self._cost_text(cost)}")

        return evolve(
            self._cost,
            start,
            self.free,
            self.choosing.windows,
            how=Evolution(generations=self.selection.number),
            reason_against=self.reason_against,
            on_generation=say,
        )

    def _say_step(self, ranked: Ranked) -> None:
        if ranked.sets and ranked.sets[0] not in self.told:
            self.told.add(ranked.sets[0])
            gone = self.blocks(ranked.sets[0])
            self.progress.say(f"without {named_blocks(gone)}: {self._cost_text(ranked.costs[0])}")

    def _cost_text(self, cost: float) -> str:
        if self.objective is None:
            return f"perplexity {perplexity(cost):.4g}"
        if self.objective.text == "worst":
            return f"{cost:+.1%} of its dense loss on the worst source"
        return f"{cost:+.4g} nats, {self.objective.text}"

    def reason_against(self, removed: RemovalSet) -> str | None:
        """Why a set cannot go exactly, or None where it can; what cannot is counted."""
        kept = [place for place in range(self.checkpoint.depth) if place not in removed]
        reason = reason_against(self.checkpoint, kept)
        if reason is not None:
            self.refused[removed] = reason
        return reason
