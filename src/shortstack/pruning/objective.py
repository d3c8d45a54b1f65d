"""What a set of blocks is chosen for, where the text has named sources: their mean, the one hit worst, or weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from shortstack.artifacts.scores import CriterionScores
from shortstack.artifacts.source_table import costs_of_source
from shortstack.errors import UsageError, did_you_mean
from shortstack.pruning.swaps import by_swaps

_KINDS = ("mean", "worst")
_EXAMPLE = "mean, worst, or weights such as general=2,code=1"


@dataclass(frozen=True)
class Objective:
    """What is to be as small as possible.

    Attributes:
        text: as the user wrote it.
        weights: of the sources; none for `mean` and `worst`.
    """

    text: str = "mean"
    weights: Mapping[str, float] = field(default_factory=dict)

    def check(self, sources: Sequence[str]) -> None:
        """Refuse weights of sources that are not there, and text without named sources.

        Raises:
            UsageError: with the names that there are.
        """
        if not sources:
            raise UsageError(
                f"--objective {self.text}: the text has one source without a name",
                hint="name several sources: --data general=books.txt,code=src.jsonl",
            )
        for name in self.weights:
            if name not in sources:
                raise UsageError(
                    f"--objective {self.text}: no source has the name {name} (sources: {', '.join(sources)})",
                    hint=did_you_mean(name, sources),
                )

    def cost(self, added: Mapping[str, float], dense: Mapping[str, float]) -> float:
        """What a set of blocks costs: the definition of every objective.

        Args:
            added: by source, what is lost without the blocks (of losses, in nats).
            dense: by source, what that is beside: the dense model's loss.

        Returns:
            The mean of what is added; the weighted mean; or for `worst` the largest share of the dense loss that is added.
        """
        if self.text == "worst":
            return max(value / dense[source] for source, value in added.items())
        weights = self.weights or dict.fromkeys(added, 1.0)
        return sum(weight * added[source] for source, weight in weights.items()) / sum(weights.values())


def parse_objective(text: str | None) -> Objective | None:
    """`mean`, `worst`, or `general=2,code=1`.

    Raises:
        UsageError: it is none of them; weights are no numbers, below 0, or all 0.
    """
    if text is None or text in _KINDS:
        return None if text is None else Objective(text)
    weights: dict[str, float] = {}
    for piece in text.split(","):
        name, equals, number = (part.strip() for part in piece.partition("="))
        if not equals:
            raise UsageError(f"--objective {text!r}: expected {_EXAMPLE}", hint=did_you_mean(text, _KINDS))
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not 0 <= weight < math.inf:
            raise UsageError(
                f"--objective {text!r}: the weight of {name} is {number!r}, expected a number of at least 0",
                hint=_EXAMPLE,
            )
        if name in weights:
            raise UsageError(f"--objective {text!r}: two weights of {name}", hint="give each source one weight")
        weights[name] = weight
    if not any(weights.values()):
        raise UsageError(f"--objective {text!r}: all weights are 0", hint="give a source a weight above 0")
    return Objective(text, weights)


@dataclass(frozen=True)
class AddedCosts:
    """What sets of blocks cost by scores of single blocks, which are added up.

    Attributes:
        found: the scores.
        objective: what the set is chosen for; None for the scores of all windows together.
    """

    found: CriterionScores
    objective: Objective | None = None

    def __post_init__(self) -> None:
        if self.objective is not None:
            self.objective.check(list(self.found.sources))

    @property
    def of_sources(self) -> dict[str, dict[int, float]]:
        """By source and block: the NLL that is added, or the score."""
        return {source: costs_of_source(self.found, source) for source in self.found.sources}

    def by_source(self, blocks: Sequence[int]) -> dict[str, float]:
        """What each source pays for a set."""
        return {source: sum(own[block] for block in blocks) for source, own in self.of_sources.items()}

    def cost(self, blocks: Sequence[int]) -> float:
        """What a set costs."""
        if self.objective is None:
            scores = self.found.by_block() or {}
            return sum(scores[block] for block in blocks)
        return self.objective.cost(self.by_source(blocks), self._dense)

    def chosen(self, protected: Collection[int] = ()) -> CriterionScores:
        """The scores by which blocks go: those of the objective, and the order in which blocks go by it.

        Costs add up in each source apart. Where the objective is their worst, what goes next depends on what is gone.

        Args:
            protected: blocks that stay.
        """
        if self.objective is None:
            return self.found
        left, order = [block for block in self.found.blocks if block not in protected], list[int]()
        while left:
            following = min(left, key=lambda block: (self.cost([*order, block]), block))
            order.append(following)
            left.remove(following)
        scores = tuple(self.cost([block]) for block in self.found.blocks)
        return CriterionScores(
            self.found.name,
            scores,
            self.found.blocks,
            stderr=self._errors(),
            known_order=(*order, *(block for block in self.found.blocks if block in protected)),
            run=self.found.run,
            sources=self.found.sources,
        )

    def swapped(
        self, removed: Sequence[int], candidates: Collection[int], may_go: Callable[[Sequence[int]], bool]
    ) -> tuple[int, ...]:
        """The set that swaps of blocks lead to where the objective is the worst source; else the set itself.

        What goes one by one for the worst source is not the best set of its size; costs of a mean add up, and it is.

        Args:
            removed: the set.
            candidates: removable blocks.
            may_go: whether a set can go exactly.
        """
        if self.objective is None or self.objective.text != "worst":
            return tuple(removed)
        dense, of_sources = self._dense, self.of_sources
        shares = {block: [own[block] / dense[name] for name, own in of_sources.items()] for block in candidates}
        return by_swaps(shares, removed, may_go)

    @property
    def _dense(self) -> dict[str, float]:
        """What a source's costs are beside: the dense loss; where a criterion has none, the mean of that source's scores."""
        found = {}
        for source, one in self.found.sources.items():
            mean = sum(map(abs, one.scores)) / len(one.scores)
            found[source] = math.log(one.dense_ppl) if one.dense_ppl is not None else mean or 1.0
        return found

    def _errors(self) -> tuple[float, ...] | None:
        """Of a mean; the worst of several has none."""
        errors = {source: one.errors_by_block() for source, one in self.found.sources.items()}
        if self.objective is None or self.objective.text == "worst" or not all(errors.values()):
            return None
        weights = self.objective.weights or dict.fromkeys(errors, 1.0)
        total = sum(weights.values())
        return tuple(
            math.sqrt(sum((weight * errors[source][block]) ** 2 for source, weight in weights.items())) / total
            for block in self.found.blocks
        )
