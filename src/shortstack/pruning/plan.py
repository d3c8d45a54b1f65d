"""Scores -> a plan and its cut: which blocks go, what that saves, and what the checkpoint is without them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from shortstack.artifacts.plan import PrunePlan, load_plan
from shortstack.artifacts.protected import protected_blocks
from shortstack.artifacts.scores import CriterionScores, Scores
from shortstack.artifacts.sources import PlanSource
from shortstack.baselines.orders import open_scores
from shortstack.checkpoint.drop_blocks import Cut, cut_blocks, reason_against
from shortstack.checkpoint.packed import weights_in
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.formatting import counted, parse_blocks, ranges
from shortstack.common.options import refuse_idle, stage, takes_fields
from shortstack.errors import ShortstackError, UsageError
from shortstack.families.open_model import open_model
from shortstack.pruning.block_seconds import NOT_TIMED, block_seconds
from shortstack.pruning.budget import amount_of_sets, check_one_amount
from shortstack.pruning.close_scores import close_scores
from shortstack.pruning.objective import AddedCosts, parse_objective
from shortstack.pruning.options import BlockChoice
from shortstack.runtime.atomic_output import check_writable_file, write_json

_CHOICE = BlockChoice()


class PlannedCut(NamedTuple):
    """A plan, the record of what was chosen and why, with the cut that it means for the opened checkpoint."""

    plan: PrunePlan
    cut: Cut


def open_plan(checkpoint: Checkpoint, plan: PlanSource) -> PlannedCut:
    """A plan from a file or in memory, with its cut of the checkpoint that it is carried out on; sizes are counted again.

    Raises:
        ShortstackError: it was made for another checkpoint, or its blocks cannot go.
    """
    made = plan if isinstance(plan, PrunePlan) else load_plan(plan)
    if made.fingerprint != checkpoint.fingerprint:
        raise ShortstackError(
            f"{checkpoint.source}: the plan was made for another checkpoint ({made.source}; the fingerprints differ)",
            hint="make a plan for this one",
        )
    removed = tuple(sorted(made.removed))
    return planned(checkpoint, removed, protected=made.protected, criterion=made.criterion, why=made.why)


@stage
def plan(
    model: str,
    *,
    out: Path | None = None,
    choice: BlockChoice = _CHOICE,
    allow_links: bool = False,
) -> PrunePlan:
    """Choose the blocks to remove, and show what their removal saves.

    Give either the blocks, or scores and how much to remove. Only the plan is written.

    Args:
        model: The checkpoint: a directory, a hub id such as `org/name@revision`, or `embedded`.
        out: Write the plan to this file (JSON).
        choice: which blocks to remove.
        allow_links: Follow symbolic links in the checkpoint that lead out of its directory.

    Returns:
        The plan.

    Raises:
        ShortstackError: the blocks do not exist or are protected, or the scores belong to another model.
    """
    if out is not None:
        check_writable_file(Path(out))
    made, _ = plan_for(open_model(model, allow_links=allow_links), choice)
    if out is not None:
        write_json(Path(out), made.to_json())
    return made


@takes_fields
def plan_for(checkpoint: Checkpoint, choice: BlockChoice = _CHOICE) -> PlannedCut:
    """`plan` for a checkpoint that is open already, with the cut."""
    amounts, scores = choice.amounts, choice.scores
    if choice.blocks is not None:
        if scores is not None or amounts:
            extra = "--scores" if scores is not None else next(iter(amounts))
            raise UsageError(f"--blocks names the blocks; {extra} contradicts it", hint="give one of them")
        refuse_idle(
            choice,
            ["criterion", "plus", "strategy", "objective", "times"],
            "with --blocks, which names the blocks",
        )
        return planned(checkpoint, tuple(sorted(parse_blocks(choice.blocks))), protected=(), criterion="given", why={})
    if scores is None:
        raise UsageError("no blocks to remove are given", hint="give --blocks 3,7-9, or --scores FILE with --remove K")
    check_one_amount(choice)
    if choice.ppl_ceiling is not None:
        raise UsageError(
            f"--ppl-ceiling {choice.ppl_ceiling}: scores do not measure the perplexity of a set of blocks",
            hint="use shortstack search, or prune --selection greedy, which measure sets",
        )
    ranking = scores if isinstance(scores, Scores) else open_scores(scores, checkpoint)
    return _planned_by(checkpoint, ranking, choice)


def _planned_by(checkpoint: Checkpoint, ranking: Scores, choice: BlockChoice) -> PlannedCut:
    """The plan by scores."""
    ranking.check_belongs_to(checkpoint)
    objective = parse_objective(choice.objective)
    costs = AddedCosts(ranking.criterion(choice.criterion), objective)
    protected, note = protected_blocks(checkpoint.original_blocks, choice.plus)
    chosen = costs.chosen(protected)
    order = [index for index in chosen.order if index not in protected]
    seconds = block_seconds(checkpoint, times=choice.times) if choice.speedup is not None else NOT_TIMED
    places = [checkpoint.position_of(index) for index in order]

    def set_of(number: int) -> tuple[tuple[int, ...], str]:
        if choice.strategy == "contiguous":
            return _cheapest_run(checkpoint, protected, costs, number), ""
        first, not_exact = first_that_may_go(checkpoint, order, number)
        return costs.swapped(first, order, lambda blocks: _reason_against(checkpoint, blocks) is None), not_exact

    wanted = amount_of_sets(
        checkpoint, places, choice, lambda number: [*map(checkpoint.position_of, set_of(number)[0])], seconds
    )
    limit = min(len(order), checkpoint.depth - 1)
    if wanted > limit:
        raise too_many(wanted, limit, checkpoint, protected, chosen.order)
    _check_run(chosen, wanted, choice)
    removed, not_exact = set_of(wanted)
    notes = [note, not_exact]
    if choice.strategy == "one-shot":
        notes.append(close_scores(checkpoint.source, ranking, chosen, order, removed, choice))
    if not wanted and choice.remove is None and order:
        notes.append(_nothing_goes(choice, checkpoint.block_parameters()[places[0]] / checkpoint.parameters()))
    if chosen.is_bare and choice.criterion is not None:
        notes.append(
            f"{ranking.source} names no criterion: it is recorded as an order by {choice.criterion}, as --criterion states"
        )
    note = "\n".join(filter(None, notes))
    why = _why(ranking, costs, removed, bool(protected), choice)
    if seconds is not NOT_TIMED:
        why["speedup"] = seconds.told([checkpoint.position_of(index) for index in removed])
    return planned(checkpoint, tuple(sorted(removed)), protected=protected, criterion=chosen.name, why=why, note=note)


def _why(ranking: Scores, costs: AddedCosts, removed: Sequence[int], plus: bool, choice: BlockChoice) -> dict[str, Any]:
    """What a plan says of how its blocks were chosen."""
    found = costs.found
    why: dict[str, Any] = {"strategy": choice.strategy, "plus": plus, "scores": ranking.provenance(found.name)}
    why |= {"objective": choice.objective} if choice.objective is not None else {}
    if found.sources:
        pays = costs.by_source(sorted(removed)[: 1 if found.run > 1 else None])
        why["sources"] = {"is_loss": found.dense_ppl is not None, "added_up": pays}
    return why


def too_many(
    wanted: int, limit: int, checkpoint: Checkpoint, protected: Sequence[int], scored: Sequence[int]
) -> ShortstackError:
    """More blocks than are removable: why the others stay, and how many would do."""
    not_scored = sorted(set(checkpoint.original_blocks).difference(scored))
    kept = f"kept: {ranges(protected)}" if protected else "one must stay"
    kept += f"; not scored: {ranges(not_scored)}" if not_scored else ""
    without_plus = min(len(scored), checkpoint.depth - 1)
    hints = [f"--remove {limit} or fewer"] if limit else []
    hints += [f"up to {without_plus} with --no-plus"] if without_plus > limit else []
    return ShortstackError(
        f"{counted(wanted, 'block')} to remove, but only {limit} of {checkpoint.depth} are removable ({kept})",
        hint="; ".join(hints) or ("score more blocks" if not_scored else "take a model with more blocks"),
    )


def _nothing_goes(choice: BlockChoice, share: float) -> str:
    """Why an amount removes no block, and what would remove one."""
    asked = next(f"{option} {value}" for option, value in choice.amounts.items())
    return f"nothing is removed by {asked}: the first block has {share:.1%} of the parameters (--remove 1 removes it)"


def _reason_against(checkpoint: Checkpoint, removed: Sequence[int]) -> str | None:
    """Why these blocks of the original model cannot go exactly, or None where they can."""
    kept = [place for place, index in enumerate(checkpoint.original_blocks) if index not in set(removed)]
    return reason_against(checkpoint, kept)


def first_that_may_go(checkpoint: Checkpoint, order: Sequence[int], wanted: int) -> tuple[tuple[int, ...], str]:
    """The first blocks of an order; where they cannot go together, those that can, and a line about the others."""
    chosen, not_exact = list(order[:wanted]), {}
    if _reason_against(checkpoint, chosen) is None:
        return tuple(chosen), ""
    chosen = []
    for index in order:
        if len(chosen) == wanted:
            break
        reason = _reason_against(checkpoint, [*chosen, index])
        if reason is None:
            chosen.append(index)
        else:
            not_exact[index] = reason
    if len(chosen) < wanted:
        first = next(iter(not_exact))
        raise ShortstackError(
            f"{checkpoint.source}: {wanted} blocks to remove, but only {len(chosen)} can be removed exactly; "
            f"block {first} cannot: {not_exact[first]}",
            hint=f"--remove {len(chosen)}, or choose with --blocks",
        )
    lines = [f"block {index} stays, though its score is lower: {reason}" for index, reason in not_exact.items()]
    return tuple(chosen), "\n".join(lines)


def _check_run(chosen: CriterionScores, wanted: int, choice: BlockChoice) -> None:
    """Refuse to take single blocks, or another number of them, by scores of runs."""
    if chosen.run > 1 and (wanted != chosen.run or choice.strategy != "contiguous"):
        raise UsageError(
            f"{chosen.name} scores runs of {chosen.run} adjacent blocks, not single ones",
            hint=f"--strategy contiguous --remove {chosen.run}",
        )


def _cheapest_run(checkpoint: Checkpoint, protected: Sequence[int], costs: AddedCosts, wanted: int) -> tuple[int, ...]:
    chosen = costs.found
    scores = chosen.by_block()
    if scores is None:
        raise ShortstackError(
            "--strategy contiguous adds up scores, but a block order has none", hint="give scores.json"
        )
    blocks = checkpoint.original_blocks
    runs = [tuple(blocks[start : start + wanted]) for start in range(len(blocks) - wanted + 1)]
    # A criterion of runs has one score for a whole run, under the block that it begins with.
    of_run = {run: run[:1] if chosen.run > 1 else run for run in runs}
    free = [run for run in runs if set(of_run[run]) <= scores.keys() and not set(run) & set(protected)]
    if not free:
        kept = sorted(set(protected).union(set(blocks) - scores.keys()))
        raise ShortstackError(
            f"no run of {wanted} adjacent blocks avoids those that are protected or not scored ({ranges(kept)})",
            hint="--no-plus, or remove fewer",
        )
    for run in sorted(free, key=lambda run: (costs.cost(of_run[run]), run)):
        if _reason_against(checkpoint, run) is None:
            return run
    raise ShortstackError(
        f"{checkpoint.source}: no run of {wanted} adjacent blocks can be removed exactly: "
        f"{_reason_against(checkpoint, free[0])}",
        hint="remove fewer, or --strategy one-shot",
    )


def planned(
    checkpoint: Checkpoint,
    removed: tuple[int, ...],
    *,
    protected: tuple[int, ...],
    criterion: str,
    why: dict[str, Any],
    note: str = "",
) -> PlannedCut:
    """The plan that removes these blocks, and its cut.

    Raises:
        ShortstackError: this set of blocks cannot be removed exactly.
    """
    made = PrunePlan(
        source=checkpoint.source,
        fingerprint=checkpoint.fingerprint,
        blocks=checkpoint.original_blocks,
        removed=removed,
        protected=protected,
        criterion=criterion,
        why=why,
        note=note,
        gone=tuple(
            sorted(set(range((checkpoint.provenance or {}).get("original_depth", 0))) - set(checkpoint.original_blocks))
        ),
    )
    # Whether this set can be removed exactly is part of the plan, not a surprise at pruning time.
    cut = cut_blocks(checkpoint, [checkpoint.position_of(index) for index in made.kept])
    before = {
        "parameters": checkpoint.parameters(),
        "bytes": checkpoint.nbytes,
        "kv_bytes_per_token": checkpoint.kv_bytes_per_token(),
    }
    after = {
        "parameters": sum(
            weights_in(copy.written, checkpoint.config.get("quantization_config"))
            for copy in cut.tensors
            if checkpoint.is_parameter(copy.source.name)
        ),
        "bytes": sum(copy.nbytes for copy in cut.tensors),
        "kv_bytes_per_token": checkpoint.kv_bytes_per_token(len(cut.kept)),
    }
    return PlannedCut(dataclasses.replace(made, before=before, after=after), cut)
