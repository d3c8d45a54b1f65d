"""Before, after, dense: the same figures of what lies on the disk, all measured in the same way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shortstack.checkpoint.reader import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.opening import open_model
from shortstack.progress import Progress
from shortstack.retraining.heldout import HeldOut
from shortstack.retraining.options import TrainingOptions


def compare(
    before: Checkpoint, after: Checkpoint | None, held_out: HeldOut, options: TrainingOptions, progress: Progress
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """(figures of each model by the name of its row, why a row is missing)."""
    from shortstack.engine.loading import load_model

    notes: list[str] = []
    chosen = {"before": before}
    if after is not None:
        chosen["after"] = after
    dense = _dense(before, options, progress, notes)
    if dense is not None:
        chosen["dense"] = dense
    rows = {}
    for which, checkpoint in chosen.items():
        model, _, place = load_model(
            checkpoint, dtype=options.dtype, device=options.device, trust_remote_code=options.trust_remote_code
        )
        rows[which] = {"parameters": checkpoint.parameters(), "figures": held_out.measure(model, place)}
        del model
    return rows, notes


def _dense(before: Checkpoint, options: TrainingOptions, progress: Progress, notes: list[str]) -> Checkpoint | None:
    record = before.provenance or {}
    source = options.dense or record.get("source")
    if source is None or (options.dense is None and not record.get("steps")):
        return None
    if options.dense is None and source != "embedded" and not Path(source).is_dir():
        notes.append(f"the dense model ({source}) is not on this disk: --dense MODEL puts it into the table")
        return None
    try:
        dense = open_model(source, progress=progress)
    except ShortstackError as error:
        notes.append(f"the dense model is not in the table: {error.message}")
        return None
    if options.dense is None and dense.fingerprint != record.get("source_fingerprint"):
        notes.append(f"{source} is no longer what was pruned: it is not in the table")
        return None
    return dense
