"""A ranking of blocks as a person reads it on a terminal."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shortstack.common.formatting import bar
from shortstack.common.tables import Table

if TYPE_CHECKING:
    from shortstack.artifacts.scores import CriterionScores


@dataclass(frozen=True)
class Scale:
    """How long the bar of a score is.

    The first block often costs a hundred times what the others do: square roots, and a longest bar that the highest scores
    exceed, keep the others' bars apart.

    Attributes:
        dense_ppl: the dense model's own, where scores are perplexities; their bars are by the NLL that is added to it.
        full: what the longest bar stands for.
    """

    dense_ppl: float | None
    full: float

    @classmethod
    def of(cls, found: CriterionScores) -> Scale:
        """The scale of a criterion's scores."""
        bare = cls(found.dense_ppl, 1.0)
        finite = [length for value in found.scores if math.isfinite(length := bare.share(value))] or [1.0]
        return cls(found.dense_ppl, min(max(finite), 3 * statistics.median(finite)) or 1.0)

    @property
    def name(self) -> str:
        """What is drawn."""
        return "score" if self.dense_ppl is None else "added NLL, square-root scale"

    def share(self, score: float, errors: float = 0.0) -> float:
        """The length of a score's bar, as a share of the longest; above 1 where it is cut.

        Args:
            score: of a block.
            errors: so much more; in NLL where scores are perplexities.
        """
        if self.dense_ppl is None:
            return abs(score + errors) / self.full
        return math.sqrt(max(0.0, math.log(score / self.dense_ppl) + errors)) / self.full


def ranking_text(found: CriterionScores, protected: Collection[int] = ()) -> str:
    """A table of blocks with bars, the one that is removed first on top; of a bare order the order alone."""
    if found.is_bare:
        return (
            f"{found.name}: only the order is known; the first is removed first\n  {', '.join(map(str, found.order))}"
        )
    scale = Scale.of(found)
    ranking, values = ranking_table(found, protected), found.by_block() or {}
    rows = []
    for row, index in zip(ranking.rows, found.order, strict=True):
        share = scale.share(values[index])
        drawn = bar(share)
        rows.append([*row, (drawn[:-1] + "▶" if share > 1 else drawn).ljust(28)])
    return Table([*ranking.head, scale.name.ljust(28)], rows, ranking.title, ranking.notes).to_text()


def ranking_table(found: CriterionScores, protected: Collection[int] = ()) -> Table:
    """The blocks, the one that is removed first on top, with their scores as far as they are known.

    Args:
        found: the scores.
        protected: blocks that stay by default, whatever their scores: they are marked, and have no rank.
    """
    values = found.by_block() or {}
    dense = found.dense_ppl
    rows = []
    ranks = itertools.count(1)
    for index in found.order:
        row = ["   +" if index in protected else f"{next(ranks):>4}", str(index)]
        value = values.get(index)
        if value is None:
            rows.append(row)
            continue
        row.append(f"{value:.6g}")
        if dense is not None:
            change = value / dense
            row.append(f"{change - 1:+.1%}" if change < 10 else f"x{change:.0f}")
        if found.stderr is not None:
            error = found.stderr[found.blocks.index(index)]
            row.append(f"{error:.4f}" if dense is not None else f"{error:.2g}")
        rows.append(row)
    header = ["rank", "block"]
    header += [] if not values else ["score" if dense is None else f"{found.name} without"]
    header += [] if dense is None else ["change"]
    header += [] if found.stderr is None else ["s.e." if dense is None else "s.e. (NLL)"]
    title = f"{found.name}: lowest = least important = removed first"
    if dense is not None:
        title += f"; dense {found.name} {dense:.6g}"
    notes = ["+ stays by default: the first four and the last two blocks, as published"] if protected else []
    return Table(header, rows, title, notes)
