"""ensemble: the mean rank of a block among those of the other criteria that were requested. Needs their scores."""

from __future__ import annotations

from shortstack.artifacts.scores import CriterionScores
from shortstack.scoring.criteria import Criterion, Swept


class Ensemble(Criterion):
    """Ranks begin at 0 for what goes first; equal scores share the mean of their ranks."""

    def finish(self, swept: Swept) -> CriterionScores:
        """Mean ranks."""
        ranks = [mean_ranks(one.scores) for one in swept.others.values()]
        return CriterionScores(
            self.name, tuple(sum(of_block) / len(ranks) for of_block in zip(*ranks, strict=True)), swept.blocks
        )


def mean_ranks(scores: tuple[float, ...]) -> list[float]:
    """The rank of each score, ascending from 0; equal ones share the mean of their ranks."""
    ordered = sorted(scores)
    return [ordered.index(score) + (ordered.count(score) - 1) / 2 for score in scores]
