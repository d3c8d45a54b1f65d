"""Find the set of blocks that costs least when it goes: a search measures sets whole, and other windows judge its choice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from shortstack.artifacts.plan import PrunePlan
from shortstack.artifacts.protected import protected_blocks
from shortstack.checkpoint.forecast import Forecast
from shortstack.common.options import stage
from shortstack.data.calibration import CalibrationOptions, check_enough
from shortstack.data.preview import preview
from shortstack.pruning.options import BlockChoice, SearchOptions
from shortstack.pruning.plan import amount_to_remove, check_one_amount, planned, too_many
from shortstack.pruning.set_search import SetSearch, opened, opened_search, parse_selection
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
    """Choose the blocks to remove by measuring sets of them, not blocks one by one.

    Half of the windows choose; the other half, which chose nothing, say what the chosen set costs, beside two alternatives.
    What sets have in common is computed once. Processes that torchrun or accelerate started together share the windows.

    Args:
        model: The checkpoint: a directory, a hub id such as `org/name@revision`, or `embedded`.
        out: Write the plan to this file (JSON).
        calibration: the windows that choose; as many again judge.
        choice: how many blocks go, and how sets are searched.
        options: how the run goes.

    Returns:
        The plan, with what was measured.

    Raises:
        ShortstackError: the checkpoint cannot be read, there is too little text, or no such set can go exactly.
    """
    selection, amount = parse_selection(choice.selection), choice.as_choice()
    check_one_amount(amount)
    checkpoint, progress = opened(model, out, options)
    protected, note = protected_blocks(checkpoint.original_blocks, choice.plus)
    with opened_search(checkpoint, calibration, selection, protected, out, options, progress) as (sets, why):
        found = _found(sets, amount, protected, note, why)
        sets.write(out, found.to_json())
    return found


def _found(
    sets: SetSearch, choice: BlockChoice, protected: tuple[int, ...], note: str, why: dict[str, Any]
) -> PrunePlan:
    checkpoint, name, sizes = sets.checkpoint, sets.selection.name, sets.checkpoint.block_parameters()
    wanted = amount_to_remove([sizes[place] for place in sets.order()], checkpoint.parameters(), choice)
    limit = min(len(sets.free), checkpoint.depth - 1)
    if wanted > limit:
        raise too_many(wanted, limit, checkpoint, protected, checkpoint.original_blocks)
    ranked, one_shot = sets.ranked(wanted), sets.one_shot(wanted)
    found = dict(zip([name, f"{name}, second", f"{name}, third"], ranked, strict=False))
    if one_shot != ranked[0]:
        found = {**dict(list(found.items())[:2]), "one-shot": one_shot}
    dense_ppl, judged = sets.judged(found)
    sets.say_refused()
    measured = {
        "dense_ppl": dense_ppl,
        "added_up": sets.added_up(ranked[0]),
        "sets_measured": sets.choosing.known,
        "sets": [one.to_json() for one in judged],
    }
    why = {"strategy": name, "measured": measured, **why}
    return planned(checkpoint, judged[0].removed, protected=protected, criterion=name, why=why, note=note).plan


def check_search(values: Mapping[str, Any]) -> list[str]:
    """Look at what a search would read, before it runs; lines about what could not be looked at.

    Raises:
        ShortstackError: an unknown selection, a text that cannot be used, or windows longer than the model takes.
    """
    parse_selection(values.get("selection", _SEARCH.selection))
    given = {one.name: values[one.name] for one in fields(_CALIBRATION) if one.name in values}
    calibration = replace(_CALIBRATION, **given)
    both = replace(calibration, samples=2 * calibration.samples)
    notes = preview(both.data, "calibration", lambda: check_enough(both))
    model: Forecast | None = values.get("model")
    if model is not None:
        model.check_positions("seq_len", calibration.seq_len)
    return notes
