"""Before, after, dense: the same figures of what lies on the disk, all measured in the same way."""

from __future__ import annotations

from typing import Any

from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.progress import Progress
from shortstack.families.open_model import dense_of
from shortstack.retraining.options import TrainingOptions
from shortstack.retraining.validation import HeldOut


def compare(
    before: Checkpoint, after: Checkpoint | None, held_out: HeldOut, options: TrainingOptions, progress: Progress
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """(figures of each model by the name of its row, why a row is missing)."""
    from shortstack.engine.load import load_model

    notes: list[str] = []
    chosen = {"before": before}
    if after is not None:
        chosen["after"] = after
    dense, note = dense_of(before, options.dense, progress)
    if dense is not None:
        chosen["dense"] = dense
    elif note:
        notes.append(f"{note}; it is not in the table")
    rows = {}
    for which, checkpoint in chosen.items():
        model, _, place = load_model(
            checkpoint, dtype=options.dtype, device=options.device, trust_remote_code=options.trust_remote_code
        )
        rows[which] = {"parameters": checkpoint.parameters(), "figures": held_out.measure(model, place)}
        del model
    return rows, notes
