"""How far two rankings of blocks agree: by Kendall's tau, and by the blocks that would go."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortstack.artifacts.protected import protected_blocks
from shortstack.artifacts.scores import Scores
from shortstack.artifacts.sources import ScoresSource
from shortstack.baselines.orders import PREFIX, open_scores
from shortstack.common.formatting import ranges, table
from shortstack.common.options import stage
from shortstack.common.shown import Shown
from shortstack.errors import ShortstackError, UsageError
from shortstack.runtime.atomic_output import check_writable_file, write_json


@dataclass(frozen=True)
class Agreement:
    """Two rankings, and how far they agree.

    Attributes:
        first: The name of one ranking.
        second: The name of the other ranking.
        tau: Kendall's tau over all blocks: 1 for the same order, about 0 for unrelated orders, -1 for opposite orders.
        chosen: For each number of removed blocks, the blocks that both rankings would remove, those that only the first
            would remove, and those that only the second would remove.
        by_chance: For each number of removed blocks, the number of blocks that two unrelated rankings have in common on
            average.
    """

    first: str
    second: str
    tau: float
    chosen: dict[int, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
    by_chance: dict[int, float]


@dataclass(frozen=True, repr=False)
class Agreements(Shown):
    """The agreement of every pair of rankings.

    Attributes:
        pairs: One entry for each pair.
        protected: The blocks that no ranking may remove, by their numbers in the original model.
    """

    pairs: list[Agreement]
    protected: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        pairs = [
            {
                "first": one.first, "second": one.second, "kendall_tau": one.tau,
                "chosen": {
                    str(k): {"both": list(both), "only_first": list(first), "only_second": list(second),
                             "both_by_chance": one.by_chance[k]}
                    for k, (both, first, second) in one.chosen.items()
                },
            }
            for one in self.pairs
        ]  # fmt: skip
        return {"schema": 1, "protected": list(self.protected), "pairs": pairs}

    def table_rows(self) -> list[dict[str, Any]]:
        """One row for each pair and each number of removed blocks."""
        return [
            {"first": one.first, "second": one.second, "tau": one.tau, "removed": k, "same": len(both)}
            | {"by chance": one.by_chance[k]}
            for one in self.pairs
            for k, (both, _, _) in one.chosen.items()
        ]

    def to_text(self) -> str:
        """One table for each pair."""
        parts = [_pair_text(one) for one in self.pairs]
        kept = f"never removed: {ranges(self.protected)}" if self.protected else "no block is protected"
        return "\n\n".join([*parts, f"{kept}; 'by chance': what two unrelated rankings have in common on average"])


def _pair_text(one: Agreement) -> str:
    rows = []
    for k, parts in one.chosen.items():
        shown = [ranges(sorted(blocks)) or "-" for blocks in parts]
        rows.append([str(k), f"{len(parts[0])} of {k}", f"{one.by_chance[k]:.1f}", *shown])
    header = ["removed", "same", "by chance", "both", "only the first", "only the second"]
    return f"{one.first} and {one.second}: Kendall's tau {one.tau:+.3f}\n" + table(header, rows)


@stage
def agree(
    *scores: ScoresSource,
    criterion: str | None = None,
    remove: int | None = None,
    plus: bool | None = None,
    out: Path | None = None,
) -> Agreements:
    """Measure how far rankings of blocks agree: Kendall's tau, and the overlap of the blocks that they would remove.

    Every ranking is compared with every other one: all criteria of all files. The rankings can be several criteria in
    one scores.json, scores from other texts, seeds or precisions, or published orders.

    Args:
        scores: The rankings: scores.json or block_order.csv files, or `published:[MODEL:]CRITERION`.
        criterion: Compare only this criterion, if files have several.
        remove: The number of blocks to remove. By default the overlap is shown for every eighth of the blocks, up to
            half of them.
        plus: Keep the first four and the last two blocks, as published. By default this is on for models of at least 10
            blocks.
        out: Write the figures to this file (JSON).

    Returns:
        Every pair.

    Raises:
        ShortstackError: there are fewer than two rankings, or they are of models with different blocks.
    """
    if not scores:
        raise UsageError("no scores given", hint="shortstack agree scores.json published:vicuna-7b-v1.3:ppl")
    if out is not None:
        check_writable_file(Path(out))
    rankings, blocks = _rankings(scores, criterion)
    if len(rankings) < 2:
        raise UsageError(
            f"found only one ranking ({next(iter(rankings))})",
            hint="give another file, or a file with several criteria",
        )
    (first_name, first), *others = rankings.items()
    for name, order in others:
        if sorted(order) != sorted(first):
            raise ShortstackError(
                f"{first_name} ranks blocks {ranges(sorted(first))}, {name} blocks {ranges(sorted(order))}",
                hint="give scores of one model, or of models of the same depth",
            )
    protected, _ = protected_blocks(blocks, plus)
    removable = len(set(first).difference(protected))
    if not removable:
        raise UsageError("every block that was scored is protected", hint="use --no-plus, or score more blocks")
    if remove is not None and not 1 <= remove <= removable:
        raise UsageError(f"--remove {remove}: expected 1 to {removable} blocks")
    counts = [remove] if remove is not None else _usual_counts(len(first), removable)
    pairs = [
        agreement_of((a, b), (rankings[a], rankings[b]), set(protected), counts)
        for a, b in itertools.combinations(rankings, 2)
    ]
    found = Agreements(pairs, protected)
    if out is not None:
        write_json(Path(out), found.to_json())
    return found


def kendall_tau(one: Sequence[int], other: Sequence[int]) -> float:
    """Kendall's tau of two orders of the same things: (pairs in the same order - pairs in the other) / all pairs."""
    place = {thing: number for number, thing in enumerate(other)}
    pairs = list(itertools.combinations([place[thing] for thing in one], 2))
    return sum(1 if a < b else -1 for a, b in pairs) / len(pairs) if pairs else 1.0


def _rankings(
    sources: Sequence[ScoresSource], criterion: str | None
) -> tuple[dict[str, tuple[int, ...]], tuple[int, ...]]:
    """(name -> order, of every criterion of every source; the blocks of their model, whether they were scored or not)."""
    # A published order may leave out its model where another file says it.
    read = {n: _opened(source) for n, source in enumerate(sources) if not str(source).startswith(PREFIX)}
    model = next((one.source for one in read.values()), None)
    found: dict[str, tuple[int, ...]] = {}
    models: dict[str, tuple[int, ...]] = {}  # of each ranking that says which blocks its model has
    for number, source in enumerate(sources):
        ranking = read[number] if number in read else _opened(source, model)
        chosen = ranking.criteria.values() if criterion is None else [ranking.criterion(criterion)]
        for one in chosen:
            name = ranking.source if isinstance(source, Scores) else str(source)
            label = name if str(name).endswith(one.name) else f"{name} {one.name}"
            while label in found:
                label += "'"
            found[label] = one.order
            if not one.is_bare:
                models[label] = ranking.blocks
    if not models:  # bare orders name every block
        return found, tuple(sorted(next(iter(found.values()))))
    (first, blocks), *others = models.items()
    for label, other in others:
        if other != blocks:
            raise ShortstackError(
                f"{first} is of a model of blocks {ranges(blocks)}, {label} of blocks {ranges(other)}",
                hint="give scores of one model, or of models of the same depth",
            )
    return found, blocks


def _opened(source: ScoresSource, model: str | None = None) -> Scores:
    return source if isinstance(source, Scores) else open_scores(source, model=model)


def _usual_counts(blocks: int, removable: int) -> list[int]:
    return sorted({min(removable, max(1, round(blocks * eighths / 8))) for eighths in range(1, 5)})


def agreement_of(
    names: tuple[str, str], rankings: tuple[Sequence[int], Sequence[int]], protected: set[int], counts: Sequence[int]
) -> Agreement:
    """How far two rankings of the same blocks agree.

    Args:
        names: of the rankings.
        rankings: the first block of each goes first.
        protected: blocks that neither may remove.
        counts: numbers of blocks that would be removed.
    """
    orders = [[block for block in order if block not in protected] for order in rankings]
    chosen = {}
    for k in counts:
        a, b = (set(order[:k]) for order in orders)
        chosen[k] = (tuple(sorted(a & b)), tuple(sorted(a - b)), tuple(sorted(b - a)))
    by_chance = {k: k * k / len(orders[0]) for k in counts}
    return Agreement(*names, kendall_tau(*rankings), chosen, by_chance)
