"""How much can be removed? The cost of 1, 2, ... blocks in one run: the set of each size is chosen, and judged elsewhere.

Legend: S sets, W windows, T tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from shortstack.artifacts.curve import Curve, CurvePoint
from shortstack.artifacts.protected import protected_blocks
from shortstack.artifacts.results import perplexity
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.extras import need_packages
from shortstack.common.formatting import counted
from shortstack.common.options import stage
from shortstack.data.calibration import CalibrationOptions
from shortstack.errors import ShortstackError, UsageError
from shortstack.pruning.objective import parse_objective
from shortstack.pruning.opened_search import opened, opened_search
from shortstack.pruning.options import CurveOptions
from shortstack.pruning.selection import parse_selection
from shortstack.pruning.set_search import Judged, SetSearch
from shortstack.runtime.atomic_output import check_writable_file, write_json
from shortstack.runtime.workspace import workspace
from shortstack.scoring.options import ScoreOptions

if TYPE_CHECKING:
    from shortstack.engine.interface import RemovalSet

_CALIBRATION, _CHOICE, _OPTIONS = CalibrationOptions(), CurveOptions(), ScoreOptions()


@stage
def curve(
    model: str,
    *,
    out: Path | None = None,
    plot: Path | None = None,
    calibration: CalibrationOptions = _CALIBRATION,
    choice: CurveOptions = _CHOICE,
    options: ScoreOptions = _OPTIONS,
) -> Curve:
    """Measure perplexity against the number of removed blocks, in one run.

    Half of the windows choose the set of each size. The other half, a validation set, measures its cost. The knee is
    where the curve bends most. The point of no return is where the model predicts no better than the dense model that
    sees only one token. Processes that torchrun or accelerate started together share the windows.

    Args:
        model: The checkpoint: a directory, a hub id such as `org/name@revision`, or `embedded`.
        out: Write the curve to this file (curve.json). If a run is killed, the same command resumes it.
        plot: Draw the curve into this PNG, with the knee and the point of no return.
        calibration: the windows that choose; as many again judge.
        choice: how far it goes, and how sets are chosen.
        options: how the run computes.

    Returns:
        The points of the curve.

    Raises:
        ShortstackError: the checkpoint cannot be read, there is too little text, or no such set can be removed exactly.
    """
    selection = parse_selection(choice.selection)
    if selection.kind in ("evolution", "swaps"):
        raise UsageError(
            f"--selection {selection.kind}: searches sets of one size only", hint="--selection greedy, or beam:4"
        )
    objective = parse_objective(choice.objective)
    if plot is not None:
        check_writable_file(Path(plot))
        need_packages("--plot", "matplotlib", extra="report")
    checkpoint, progress, leads = opened(model, out, options)
    protected, note = protected_blocks(checkpoint.original_blocks, choice.plus)
    most = _most(checkpoint, len(protected), choice.most)
    with workspace(out, leads=leads) as work:
        with opened_search(checkpoint, calibration, selection, protected, work, options, progress, objective) as (
            sets,
            why,
        ):
            if note:
                progress.say(note)
            dense_ppl, judged = sets.judged({str(len(one)): one for one in _sets(sets, most)})
            sets.say_refused()
            one_token = perplexity(float(sets.judging.nll_after_one_token().mean()))
        points = tuple(_point(checkpoint, one) for one in judged)
        found = Curve(checkpoint.source, checkpoint.fingerprint, selection.name, dense_ppl, one_token, points, why)
        if out is not None and leads:
            write_json(Path(out), found.to_json())
    if plot is not None and leads:
        from shortstack.pruning.curve_plot import write_curve

        write_curve(found, Path(plot))
    return found


def _point(checkpoint: Checkpoint, judged: Judged) -> CurvePoint:
    sizes = dict(zip(checkpoint.original_blocks, checkpoint.block_parameters(), strict=True))
    left = checkpoint.parameters() - sum(sizes[block] for block in judged.removed)
    return CurvePoint(judged.removed, left, judged.ppl, judged.increase, judged.stderr, judged.sources)


def _most(checkpoint: Checkpoint, protected: int, asked: int | None) -> int:
    """How far the curve goes."""
    limit = min(checkpoint.depth - protected, checkpoint.depth - 1)
    if limit < 1:
        raise ShortstackError(
            f"{checkpoint.source}: none of its {counted(checkpoint.depth, 'block')} is removable "
            f"({f'{protected} are protected' if protected else 'one must stay'})",
            hint="--no-plus" if protected and checkpoint.depth > 1 else "take a model with more blocks",
        )
    if asked is None:
        return max(1, -(-limit // 2))
    if not 1 <= asked <= limit:
        raise UsageError(f"--most {asked}: expected 1 to {limit} blocks of {checkpoint.source}")
    return asked


def _sets(sets: SetSearch, most: int) -> list[RemovalSet]:
    """The chosen set of each size, rising; sizes that no set of this family has are left out."""
    if sets.selection.kind in ("greedy", "beam"):
        return [step.sets[0] for step in sets.steps(most) if step.sets]
    found = []
    for size in range(1, most + 1):
        try:
            found.append(sets.ranked(size)[0])
        except ShortstackError as error:
            sets.progress.say(f"no set of {size}: {error}")
    return found
