"""Find the set of blocks that costs least when it goes: a search measures sets whole, and other windows judge its choice."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from shortstack.artifacts.plan import PrunePlan
from shortstack.artifacts.protected import protected_blocks
from shortstack.checkpoint.forecast import Forecast
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.extras import need_packages
from shortstack.common.options import refuse_idle, stage
from shortstack.common.progress import Progress
from shortstack.data.calibration import CalibrationOptions
from shortstack.data.named_sources import preview_calibration
from shortstack.pruning.block_seconds import NOT_TIMED, block_seconds
from shortstack.pruning.budget import amount_of_sets, ceiling_nll, check_one_amount
from shortstack.pruning.objective import parse_objective
from shortstack.pruning.opened_search import opened, opened_search
from shortstack.pruning.options import Budget, SearchOptions
from shortstack.pruning.plan import PlannedCut, planned, too_many
from shortstack.pruning.rescoring import Between, parse_rescore
from shortstack.pruning.selection import parse_selection
from shortstack.pruning.set_search import Judged, SetSearch
from shortstack.runtime.atomic_output import write_json
from shortstack.runtime.workspace import workspace
from shortstack.scoring.options import ScoreOptions

_CALIBRATION, _SEARCH, _OPTIONS = CalibrationOptions(), SearchOptions(), ScoreOptions()


@stage
def search(
    model: str,
    *,
    out: Path | None = None,
    calibration: CalibrationOptions = _CALIBRATION,
    choice: SearchOptions = _SEARCH,
    options: ScoreOptions = _OPTIONS,
) -> PrunePlan:
    """Choose the blocks to remove by measuring whole sets of blocks.

    Half of the windows choose the set. The other half, a validation set, measures the cost of the chosen set and of two
    alternatives. Computation that sets have in common is done once. Processes that torchrun or accelerate started
    together share the windows.

    Args:
        model: The checkpoint: a directory, a hub id such as `org/name@revision`, or `embedded`.
        out: Write the plan to this file (JSON).
        calibration: the windows that choose; as many again judge.
        choice: how many blocks go, and how sets are searched.
        options: how the run computes.

    Returns:
        The plan, with the measured costs of the chosen set and of the alternatives.

    Raises:
        ShortstackError: the checkpoint cannot be read, there is too little text, or no such set can be removed exactly.
    """
    check_choice(choice)
    checkpoint, progress, leads = opened(model, out, options)
    with workspace(out, leads=leads) as work:
        found = searched(checkpoint, calibration, choice, options, progress, work).plan
        if out is not None and leads:
            write_json(Path(out), found.to_json())
    return found


def check_choice(choice: SearchOptions) -> None:
    """Refuse a search that cannot be understood.

    Raises:
        UsageError: no such selection, or not one amount.
    """
    parse_selection(choice.selection, choice.rescore)
    if choice.rescore is not None:
        parse_rescore(choice.rescore)
        refuse_idle(choice, ["objective"], "with --rescore, which takes the criterion's own scores")
    parse_objective(choice.objective)
    check_one_amount(choice)
    if choice.ppl_ceiling is not None:
        ceiling_nll(choice.ppl_ceiling, 0.0)


def searched(
    checkpoint: Checkpoint,
    calibration: CalibrationOptions,
    choice: SearchOptions,
    options: ScoreOptions,
    progress: Progress,
    work: Path | None,
    between: Between | None = None,
) -> PlannedCut:
    """The set that a search chooses for a checkpoint that is open already: what `search` and `prune` share.

    Args:
        work: where losses are kept, so that a search that was killed resumes; None keeps them nowhere.
        between: with `rescore`, what changes each step's checkpoint before it is scored.
    """
    selection, objective = parse_selection(choice.selection, choice.rescore), parse_objective(choice.objective)
    protected, note = protected_blocks(checkpoint.original_blocks, choice.plus)
    with opened_search(checkpoint, calibration, selection, protected, work, options, progress, objective) as (
        sets,
        why,
    ):
        if sets.rescoring is not None:
            sets.rescoring.between = between
        return _found(sets, choice, protected, note, why)


def _found(sets: SetSearch, choice: Budget, protected: tuple[int, ...], note: str, why: dict[str, Any]) -> PlannedCut:
    checkpoint, name, seconds = sets.checkpoint, sets.selection.name, NOT_TIMED
    limit = min(len(sets.free), checkpoint.depth - 1)
    if choice.ppl_ceiling is not None:
        wanted = sets.most_under(choice.ppl_ceiling, limit)
    else:
        if choice.speedup is not None:
            seconds = block_seconds(checkpoint, sets.choosing.engine, times=choice.times)
        sets.order()  # single blocks and the dense model in one sweep: every search needs them
        wanted = amount_of_sets(checkpoint, sets.free, choice, lambda number: sets.ranked(number)[0], seconds)
    if wanted > limit:
        raise too_many(wanted, limit, checkpoint, protected, checkpoint.original_blocks)
    ranked, one_shot = sets.ranked(wanted), sets.one_shot(wanted)
    found = dict(zip([name, f"{name}, second", f"{name}, third"], ranked, strict=False))
    if one_shot != ranked[0]:
        found = {**dict(list(found.items())[:2]), "one-shot": one_shot}
    if sets.gates is not None:
        found["block influence"] = sets.first_of(sets.gates.by_influence(sets.free), wanted)
    dense_ppl, judged = sets.judged(found)
    sets.say_refused()
    measured = {
        "dense_ppl": dense_ppl,
        "added_up": sets.added_up(ranked[0]),
        "sets_measured": sets.choosing.known,
        "sets": [one.to_json() for one in judged],
    }
    why = {"strategy": name, "measured": measured, **why}
    if sets.rescoring is not None:
        why["rescored"] = {"by": sets.selection.rescore, "order": list(sets.rescoring.removed)}
    if sets.gates is not None:
        why["gates"] = sets.gates.to_json(sets)
        note = "\n".join(filter(None, [note, sets.gates.note(sets, ranked[0])]))
    if choice.ppl_ceiling is not None:
        why["ppl_ceiling"] = choice.ppl_ceiling
        note = "\n".join(filter(None, [note, _over_elsewhere(choice.ppl_ceiling, dense_ppl, judged[0])]))
    if seconds is not NOT_TIMED:
        why["speedup"] = seconds.told(sorted(ranked[0]))
    return planned(checkpoint, judged[0].removed, protected=protected, criterion=name, why=why, note=note)


def _over_elsewhere(ceiling: str, dense_ppl: float, judged: Judged) -> str:
    """A line where the set that keeps a ceiling on the windows that chose it does not on the others."""
    limit = math.exp(ceiling_nll(ceiling, math.log(dense_ppl)))
    if judged.ppl <= limit:
        return ""
    return (
        f"on the validation windows its perplexity of {judged.ppl:.4g} is over the ceiling of {limit:.4g}: "
        "more --samples choose more safely"
    )


def check_prune(values: Mapping[str, Any]) -> list[str]:
    """What `check_search` looks at, where pruning searches.

    Raises:
        ShortstackError: as there.
    """
    return [] if values.get("selection") is None else check_search(values)


def check_search(values: Mapping[str, Any]) -> list[str]:
    """Look at what a search would read, before it runs; lines about what could not be looked at.

    Raises:
        ShortstackError: an unknown selection, a text that cannot be used, or windows longer than the model takes.
    """
    parse_selection(values.get("selection", _SEARCH.selection), values.get("rescore"))
    parse_objective(values.get("objective"))
    if values.get("plot") is not None:
        need_packages("plot", "matplotlib", extra="report")
    given = {one.name: values[one.name] for one in fields(_CALIBRATION) if one.name in values}
    calibration = replace(_CALIBRATION, **given)
    both = replace(calibration, samples=2 * calibration.samples)
    notes = preview_calibration(both)
    model: Forecast | None = values.get("model")
    if model is not None:
        model.check_positions("seq_len", calibration.seq_len)
    return notes
