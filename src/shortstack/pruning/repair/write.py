"""Repairs into a staged checkpoint: its changed tensors are written over, its record and card are written again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortstack.artifacts import provenance
from shortstack.artifacts.results import perplexity
from shortstack.checkpoint.byte_copy import read_through
from shortstack.checkpoint.headers import TensorInfo
from shortstack.checkpoint.reader import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.families.open_model import open_checkpoint
from shortstack.pruning.repair.fitted import Fitted, opened
from shortstack.pruning.repair.folds import Change, changes
from shortstack.pruning.repair.options import Method
from shortstack.publishing.card_text import CARD, carried_over
from shortstack.publishing.model_card import write_card
from shortstack.runtime.devices import exact_place


@dataclass(frozen=True)
class Folded:
    """What was written.

    Attributes:
        step: of the history.
        files: sha256 of every file, by name.
    """

    step: dict[str, Any]
    files: dict[str, str]


def fold_into(
    folder: Path,
    pruned: Checkpoint,
    dense: Checkpoint,
    method: Method,
    found: Fitted,
    files: Mapping[str, str],
    copied: Callable[[], Mapping[str, str]],
) -> Folded:
    """Fold repairs into a copy of the pruned checkpoint that lies in a stage, and say so in its record and card.

    Args:
        folder: the copy.
        pruned: what it is a copy of, or, where it was pruned a moment ago, itself.
        dense: the dense model.
        method: that was requested.
        found: the repairs.
        files: sha256 of every file, by name.
        copied: writes the weights as they were before.

    Raises:
        ShortstackError: a changed value is not finite in the type that it is stored in.
    """
    staged = open_checkpoint(folder, family=pruned.anatomy.family)
    edits = changes(staged, found.residual, [one.fold for one in found.repaired])
    hashes = write_over(staged, edits)
    nll = _nll(staged, found) if edits else found.pruned_nll
    undone = method == "auto" and edits and nll > found.pruned_nll
    if undone:  # what was gained was lost to rounding
        for path in staged.shards:
            path.unlink()
        edits, hashes, nll = {}, dict(copied()), found.pruned_nll
    step = _step(pruned, dense, method, found, sorted(edits), nll)
    record = provenance.read(folder)
    assert record is not None
    steps = [*(one for one in record["steps"] if one != {"stage": "repair"}), step]
    renewed = {**record, "steps": steps, "files": {**files, **hashes}}
    return Folded(step, write_card(folder, renewed, carried_over(folder / CARD)))


def write_over(staged: Checkpoint, edits: Mapping[str, Sequence[Change]]) -> dict[str, str]:
    """Overwrite tensors in their places; the sha256 of every file that changed, by name."""
    from shortstack.engine.storage import Buffer, OpenFiles, bytes_of

    by_file: dict[Path, list[TensorInfo]] = {}
    for name in edits:
        by_file.setdefault(staged.tensors[name].file, []).append(staged.tensors[name])
    hashes = {}
    for path, tensors in by_file.items():
        with contextlib.closing(OpenFiles()) as files, path.open("r+b") as stream:
            for tensor in tensors:
                stored = Buffer(files.buffer_bytes([tensor])).fill([tensor], files)[tensor.name]
                changed = exact_place(stored).double()
                for edit in edits[tensor.name]:
                    changed = edit(changed)
                stream.seek(tensor.start)
                stream.write(bytes_of(changed.to(stored.dtype).contiguous()))
            stream.flush()
            os.fsync(stream.fileno())
        hashes[path.name], broken = read_through(path, [one for one in staged.tensors.values() if one.file == path])
        if broken is not None:
            raise ShortstackError(
                f"{staged.source}: {broken} would not be finite once it is repaired and stored as "
                f"{staged.tensors[broken].dtype}",
                hint="use --method scale, or more windows",
            )
    return hashes


def _nll(staged: Checkpoint, found: Fitted) -> float:
    """Mean NLL of what was written on the validation windows."""
    from shortstack.engine.cpu import computing
    from shortstack.engine.forward import embedded
    from shortstack.engine.interface import Windows
    from shortstack.pruning.repair.states import nll_from

    how = found.engine
    with contextlib.closing(opened(staged, how)) as model, computing(how.dtype, how.device):
        windows = Windows.of(found.validation, how.device)
        return float(nll_from(model, embedded(model.skeleton, windows.ids_WT)[None], windows, 0).mean())


def _step(
    pruned: Checkpoint, dense: Checkpoint, method: Method, found: Fitted, tensors: Sequence[str], nll: float
) -> dict[str, Any]:
    """What shortstack.json says of it."""
    undone = not tensors
    places = [
        {
            "where": one.place.name,
            "position": one.place.position,
            "removed": list(one.place.removed),
            "method": "none" if undone else one.chosen.method,
            "factor": 1.0 if undone else one.chosen.map.factor,
            "ridge": None if undone else one.chosen.ridge,
            "first_token": not undone and one.chosen.first_token,
            "ppl": {name: perplexity(loss) for name, loss in one.nll.items()},
        }
        for one in found.repaired
    ]
    means = {"dense": found.dense_nll, "pruned": found.pruned_nll, "repaired": nll}
    return {
        "stage": "repair",
        "method": method,
        "source": pruned.source,
        "fingerprint": pruned.fingerprint,
        "dense": {"source": dense.source, "fingerprint": dense.fingerprint},
        "places": places,
        "ppl": {
            **{name: perplexity(loss) for name, loss in means.items()},
            "unfolded": perplexity(found.pruned_nll if undone else found.nll),
        },
        "tensors": list(tensors),
        "calibration": found.calibration,
        "settings": {"dtype": str(found.engine.dtype).removeprefix("torch."), "device": str(found.engine.device)},
        "versions": provenance.versions(),
    }
