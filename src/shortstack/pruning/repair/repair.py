"""Pruned checkpoint and its dense model -> the same checkpoint repaired, in closed form, whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shortstack.checkpoint.drop_blocks import Cut, cut_blocks
from shortstack.checkpoint.forecast import Forecast
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.clock import command_seconds
from shortstack.common.formatting import seconds
from shortstack.common.options import refuse_idle, stage
from shortstack.common.progress import Progress
from shortstack.common.shown import Shown
from shortstack.data.calibration import CalibrationOptions, check_enough
from shortstack.data.preview import preview
from shortstack.families.open_model import open_checkpoint, open_model
from shortstack.pruning.prune import copy_weights
from shortstack.pruning.repair.fitted import check_repairable, fitted
from shortstack.pruning.repair.options import WINDOWS, Method, RepairOptions
from shortstack.pruning.repair.text import repair_text, share_back
from shortstack.pruning.repair.write import fold_into
from shortstack.publishing.model_card import write_beside_weights
from shortstack.runtime.atomic_output import check_output, published
from shortstack.scoring.options import ScoreOptions

_REPAIR, _OPTIONS = RepairOptions(), ScoreOptions()


@dataclass(frozen=True, repr=False)
class RepairResult(Shown):
    """The repaired checkpoint that was written.

    Attributes:
        out: The new checkpoint.
        source: The pruned checkpoint that was repaired.
        dense: The model that it was pruned from.
        places: The repair at each cut: `removed`, `method`, `factor`, `ridge`, `first_token` (whether it was fitted on
            the first token of each window, too), and the `ppl` with each method.
        ppl: The perplexity on the validation windows: `dense`, `pruned`, `repaired` (as written) and `unfolded` (before
            rounding).
        tensors: The number of changed tensors.
        calibration: The calibration windows.
        files: The sha256 of each file that was written, by its name.
        seconds: The wall-clock time in seconds.
    """

    out: Path
    source: str
    dense: str
    places: list[dict[str, Any]]
    ppl: dict[str, float]
    tensors: int
    calibration: dict[str, Any]
    files: dict[str, str]
    seconds: float

    @property
    def share_back(self) -> float | None:
        """The recovered share of the log-perplexity that the removal cost: 1 is all of it. None if it cost nothing."""
        return share_back(self.ppl)

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return {"schema": 1, **vars(self), "out": str(self.out), "share_back": self.share_back}

    def table_rows(self) -> list[dict[str, Any]]:
        """One row for each model."""
        return [{"model": name, "ppl": self.ppl[name]} for name in ("dense", "pruned", "repaired")]

    def to_text(self) -> str:
        """What a person reads on the terminal."""
        tensors = f"{self.tensors} tensor{'' if self.tensors == 1 else 's'}"
        first = f"{self.out}: {self.source} repaired in {seconds(self.seconds)}: {tensors} changed, no other one"
        return "\n".join([first, *repair_text(self.places, self.ppl)])


@stage
def repair(
    model: str,
    *,
    of: str,
    out: Path,
    method: Method = "auto",
    calibration: CalibrationOptions = WINDOWS,
    fitting: RepairOptions = _REPAIR,
    force: bool = False,
    options: ScoreOptions = _OPTIONS,
) -> RepairResult:
    """Repair a pruned checkpoint without training, by changing weights beside each cut in closed form.

    The change brings the hidden states behind a cut nearer to those of the dense model. Both models run side by side,
    block by block; neither is held whole unless it is small. The result is a plain checkpoint of the same family with
    the same config.

    Source: Prune&Comp (`scale`), ReplaceMe (`linear`, arXiv 2505.02819), Ghosted Layers (the yardstick of `full`, arXiv
    2605.15491). docs/how-it-works.md has the formulas.

    Args:
        model: The pruned checkpoint: a directory that shortstack made, or a hub id.
        of: The dense model that MODEL was pruned from.
        out: Write the checkpoint to this directory.
        method: The repair. `scale` multiplies hidden states at a cut by a factor; `linear` applies a linear map to the
            output of the MLP before the cut; `full` refits the last projection of that MLP, together with a factor;
            `auto` takes at each cut the repair with the lowest loss on validation windows, or none.
        calibration: the windows to fit on; a quarter as many others choose.
        fitting: how maps are fitted.
        force: Replace an existing output that shortstack made.
        options: how the models are run.

    Returns:
        The repair of each cut, and the perplexity before and after.

    Raises:
        ShortstackError: the dense model is another one, the family cannot hold the repair, there is too little text,
            hidden states are not finite, or the output cannot be written.
    """
    refuse_idle(
        options, ["memory_limit", "save_every"], "here: a repair keeps two streams of hidden states, and no state"
    )
    progress = Progress(quiet=options.quiet)
    dense = open_model(of, allow_links=options.allow_links, progress=progress)
    pruned = open_model(model, allow_links=options.allow_links, tokenizer=options.tokenizer, progress=progress)
    inputs = [pruned.directory, dense.directory]
    check_output(out, inputs=inputs, force=force)
    check_repairable(dense, pruned, method, fitting)
    found = fitted(dense, pruned, method, calibration, fitting, options, progress)
    with published(out, inputs=inputs, nbytes=pruned.nbytes, force=force) as folder:

        def copied() -> dict[str, str]:
            return copy_weights(pruned, cut_blocks(pruned, range(pruned.depth)), folder, False, progress)

        files = write_beside_weights(
            pruned, folder, config=dict(pruned.config), step={"stage": "repair"}, files=copied(), progress=progress
        )
        folded = fold_into(folder, pruned, dense, method, found, files, copied)
    step = folded.step
    return RepairResult(
        Path(out), pruned.source, dense.source, step["places"], step["ppl"], len(step["tensors"]), step["calibration"],
        folded.files, command_seconds(),
    )  # fmt: skip


def repaired_in(
    folder: Path,
    out: str,
    dense: Checkpoint,
    cut: Cut,
    files: dict[str, str],
    how: tuple[Method, CalibrationOptions, ScoreOptions, Progress],
    verified: str | None,
) -> tuple[dict[str, Any], dict[str, str], str | None]:
    """Repair what was pruned a moment ago where it lies, in its stage.

    Args:
        folder: the stage.
        out: what it will be called.
        dense: what it was pruned from.
        cut: what it keeps of that.
        files: sha256 of what lies there, by name.
        how: the method, the windows (the defaults of `repair` where they are those of scores), how models are run, and
            where it is reported.
        verified: what a check of the pruned checkpoint found; None where none was requested.

    Returns:
        What was done and gave, sha256 of every file, and what a check of it all found.
    """
    method, calibration, options, progress = how
    pruned = replace(open_checkpoint(folder, family=dense.anatomy.family), source=out, tokenizer=dense.tokenizer)
    found = fitted(dense, pruned, method, windows_of(calibration), _REPAIR, options, progress)

    def copied() -> dict[str, str]:
        return copy_weights(dense, cut, folder, False, progress)

    folded = fold_into(folder, pruned, dense, method, found, files, copied)
    changed = folded.step["tensors"]
    if verified is not None:
        from shortstack.pruning.verify import compare_bytes

        same = compare_bytes(cut, open_checkpoint(folder, family=dense.anatomy.family), changed=changed)
        verified = (
            f"before the repair {verified}; after it {same - len(changed)} tensors equal byte for byte and {len(changed)} "
            "repaired: its logits are others, and perplexity is stated in their place"
        )
    return {"places": folded.step["places"], "ppl": folded.step["ppl"]}, folded.files, verified


def windows_of(calibration: CalibrationOptions) -> CalibrationOptions:
    """The windows to fit on beside a search: the defaults of `repair` where they are those of scores."""
    usual = CalibrationOptions()
    sizes = {
        name: getattr(WINDOWS if getattr(calibration, name) == getattr(usual, name) else calibration, name)
        for name in ("samples", "seq_len")
    }
    return replace(calibration, **sizes)


def repair_in_place(
    folder: Path, dense: Checkpoint, method: Method, calibration: CalibrationOptions, options: ScoreOptions
) -> None:
    """Repair a checkpoint of the run's own state where it lies."""
    made = folder.with_name(f"{folder.name}-repaired")
    usual = ScoreOptions()
    quiet = replace(options, memory_limit=usual.memory_limit, save_every=usual.save_every, quiet=True)
    repair(
        str(folder),
        of=str(dense.directory),
        out=made,
        method=method,
        calibration=calibration,
        options=quiet,
        force=True,
    )
    shutil.rmtree(folder)
    made.rename(folder)


def check_repair(values: Mapping[str, Any]) -> list[str]:
    """Look at what would be read, before it runs; lines about what could not be looked at.

    Raises:
        ShortstackError: the text cannot be used, or windows are longer than the model takes.
    """
    given = {name: values[name] for name in ("data", "samples", "seq_len") if name in values}
    calibration = CalibrationOptions(**{"samples": WINDOWS.samples, "seq_len": WINDOWS.seq_len, **given})
    notes = preview(calibration.data, "calibration", lambda: check_enough(calibration))
    model: Forecast | None = values.get("model")
    if model is not None:
        model.check_positions("seq_len", calibration.seq_len)
    return notes
