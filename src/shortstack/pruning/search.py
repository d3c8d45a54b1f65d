"""Find the set of blocks that costs least when it goes: a search measures sets whole, and other windows judge its choice."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from shortstack.artifacts.plan import PrunePlan
from shortstack.artifacts.protected import protected_blocks
from shortstack.checkpoint.forecast import Forecast
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.options import stage
from shortstack.common.progress import Progress
from shortstack.data.calibration import CalibrationOptions, CalibrationSet, check_enough
from shortstack.data.preview import preview
from shortstack.errors import UsageError
from shortstack.families.open_model import open_model
from shortstack.pruning.options import BlockChoice, SearchOptions
from shortstack.pruning.plan import amount_to_remove, planned, too_many
from shortstack.pruning.set_search import Selection, opened_search, parse_selection, refuse_quantized
from shortstack.runtime.atomic_output import check_writable_file, locked, write_json
from shortstack.runtime.distributed import Process
from shortstack.scoring.options import ScoreOptions
from shortstack.scoring.score import calibration_windows

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
    selection = parse_selection(choice.selection)
    _check_amount(choice)
    if out is not None:
        check_writable_file(Path(out))
    process = Process.from_environment()
    progress = Progress(quiet=options.quiet or not process.leads)
    checkpoint = open_model(model, allow_links=options.allow_links, tokenizer=options.tokenizer, progress=progress)
    refuse_quantized(checkpoint)
    drawn = calibration_windows(
        checkpoint,
        replace(calibration, samples=2 * calibration.samples),
        trust_remote_code=options.trust_remote_code,
        progress=progress,
    )
    work = None if out is None else Path(out).absolute().parent / f".{Path(out).name}.shortstack-work"
    with contextlib.nullcontext() if out is None or not process.leads else locked(Path(out).absolute()):
        found = _searched(checkpoint, drawn, selection, choice.as_choice(), options, work, progress)
        if out is not None and work is not None and process.leads:
            write_json(Path(out), found.to_json())
            shutil.rmtree(work, ignore_errors=True)
    return found


def _check_amount(choice: SearchOptions) -> None:
    amounts = choice.as_choice().amounts
    if len(amounts) != 1:
        found = "none" if not amounts else " and ".join(amounts)
        raise UsageError(f"give one of --remove, --ratio, --params (found {found})", hint="such as --remove 6")


def _searched(
    checkpoint: Checkpoint,
    drawn: CalibrationSet,
    selection: Selection,
    choice: BlockChoice,
    options: ScoreOptions,
    work: Path | None,
    progress: Progress,
) -> PrunePlan:
    protected, note = protected_blocks(checkpoint.original_blocks, choice.plus)
    with opened_search(checkpoint, drawn, selection, protected, options, work, progress) as (sets, settings):
        sizes = checkpoint.block_parameters()
        wanted = amount_to_remove([sizes[place] for place in sets.order()], checkpoint.parameters(), choice)
        limit = min(len(sets.free), checkpoint.depth - 1)
        if wanted > limit:
            raise too_many(wanted, limit, checkpoint, protected, checkpoint.original_blocks)
        ranked, one_shot = sets.ranked(wanted), sets.one_shot(wanted)
        names = [selection.name, f"{selection.name}, second", f"{selection.name}, third"]
        found = dict(zip(names, ranked, strict=False))
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
    why = {
        "strategy": selection.name,
        "plus": bool(protected),
        "measured": measured,
        "calibration": drawn.first(len(drawn.windows) // 2).record,
        "settings": settings,
    }
    removed = judged[0].removed
    return planned(checkpoint, removed, protected=protected, criterion=selection.name, why=why, note=note).plan


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
