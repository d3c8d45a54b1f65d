"""What each named source pays for each block: the same figures for a terminal and a heat map."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from shortstack.common.tables import Table

if TYPE_CHECKING:
    from shortstack.artifacts.scores import CriterionScores


def costs_of_source(found: CriterionScores, source: str) -> dict[int, float]:
    """By block, what a source pays: of perplexities the added NLL, of other criteria the score."""
    one = found.sources[source]
    if one.dense_ppl is None:
        return dict(zip(one.blocks, one.scores, strict=True))
    return {block: math.log(score / one.dense_ppl) for block, score in zip(one.blocks, one.scores, strict=True)}


def sources_table(found: CriterionScores) -> Table:
    """A row per block in the order of removal, a column per source: the change of its perplexity, or its score."""
    costs = {source: costs_of_source(found, source) for source in found.sources}
    rows = []
    for block in found.order:
        cells = [_cell(costs[source][block], found, source, block) for source in found.sources]
        rows.append([str(block), *cells])
    heads = ["block", *found.sources]
    if found.dense_ppl is None:
        return Table(heads, rows, f"{found.name} of each source, with standard errors")
    dense = ", ".join(f"{source} {one.dense_ppl:.4g}" for source, one in found.sources.items())
    title = f"{found.name}: the cost of removing a block for each source, with standard errors"
    return Table(heads, rows, title, [f"changes of perplexity; the dense model has {dense}"])


def _cell(cost: float, found: CriterionScores, source: str, block: int) -> str:
    error = found.sources[source].errors_by_block().get(block)
    if found.dense_ppl is None:
        return f"{cost:.4g}" + (f" ±{error:.2g}" if error is not None else "")
    ratio = math.exp(min(cost, 700.0))
    if ratio >= 10:
        return f"x{ratio:.3g}"
    return f"{ratio - 1:+.1%}" + (f" ±{100 * ratio * error:.1f}" if error is not None else "")
