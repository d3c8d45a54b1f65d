"""A search over sets of blocks, opened: the model, windows that choose and windows that judge, where losses are kept."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.artifacts.provenance import versions
from shortstack.artifacts.scores import CriterionScores
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.formatting import parse_size
from shortstack.common.progress import Progress
from shortstack.data.calibration import CalibrationOptions, CalibrationSet, check_windows
from shortstack.engine.select import EngineOptions
from shortstack.errors import ShortstackError, UsageError
from shortstack.families.open_model import open_model
from shortstack.pruning.objective import Objective
from shortstack.pruning.rescoring import Rescoring, parse_rescore
from shortstack.pruning.selection import Selection
from shortstack.pruning.set_search import SetSearch
from shortstack.runtime.atomic_output import check_writable_file
from shortstack.runtime.devices import pick_device, pick_dtype, pick_scoring_dtype
from shortstack.runtime.distributed import Process, together
from shortstack.runtime.libraries import import_transformers
from shortstack.scoring.options import ScoreOptions
from shortstack.scoring.score import calibration_windows, score_windows
from shortstack.scoring.shared_windows import SharedWindows

if TYPE_CHECKING:
    import torch

    from shortstack.engine.interface import Engine
    from shortstack.scoring.search.measured_sets import MeasuredSets


def opened(model: str, out: Path | None, options: ScoreOptions) -> tuple[Checkpoint, Progress, bool]:
    """The checkpoint, opened; where to say what happens; whether this process writes. Nothing was read of its weights.

    Raises:
        ShortstackError: it cannot be read or is quantized, or `out` cannot be written.
    """
    if out is not None:
        check_writable_file(Path(out))
    leads = Process.from_environment().leads
    progress = Progress(quiet=options.quiet or not leads)
    checkpoint = open_model(model, allow_links=options.allow_links, tokenizer=options.tokenizer, progress=progress)
    check_measurable(checkpoint)
    return checkpoint, progress, leads


def check_measurable(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint without which sets of blocks cannot be measured.

    Raises:
        ShortstackError: it is quantized.
    """
    if "quantization_config" in checkpoint.config:
        raise ShortstackError(
            f"{checkpoint.source}: is quantized; sets are measured on full-precision weights",
            hint="search on the checkpoint before quantization; its blocks are the same",
        )


@contextlib.contextmanager
def opened_search(
    checkpoint: Checkpoint,
    calibration: CalibrationOptions,
    selection: Selection,
    protected: Collection[int],
    work: Path | None,
    options: ScoreOptions,
    progress: Progress,
    objective: Objective | None = None,
) -> Iterator[tuple[SetSearch, dict[str, Any]]]:
    """A search on a model, and what a record says of it.

    Twice as many windows are drawn as were requested: the first half chooses, the others judge.

    Args:
        protected: blocks of the original model that stay.
        work: the folder where losses are kept, so that a search that was killed resumes; None keeps them in memory alone.
    """
    import_transformers()
    from shortstack.engine.cpu import computing
    from shortstack.engine.select import choose_engine
    from shortstack.scoring.search.measured_sets import MeasuredSets

    process, progress = Process.from_environment(), progress.without_repeats()
    drawn = calibration_windows(
        checkpoint,
        replace(calibration, samples=2 * calibration.samples),
        options=options,
        progress=progress,
    )
    check_windows(checkpoint, drawn.windows)
    first, second = drawn.halves()
    if objective is not None:
        objective.check(list(first.places))
    own, place = process.part(len(first.windows)), process.own_device(pick_device(options.device))
    stored = checkpoint.tensors[checkpoint.anatomy.embedding].dtype
    how = EngineOptions(
        _dtype(selection, options, stored, place, progress),
        place,
        options.memory,
        trust_remote_code=options.trust_remote_code,
        memory_bytes=None if options.memory_limit is None else parse_size(options.memory_limit, "--memory-limit"),
        say=progress.say,
    )
    settings = {"dtype": str(how.dtype).removeprefix("torch."), "device": str(place)}

    def measured(engine: Engine, drawn: CalibrationSet, what: str, work: Path | None) -> MeasuredSets:
        text = SharedWindows(drawn.windows, process, drawn.places, drawn.counted)
        key = {
            "fingerprint": checkpoint.fingerprint,
            "windows": text.sha256,
            **settings,
            "versions": versions(),
        }
        file = work / f"{what}.jsonl" if work is not None and process.world == 1 else None
        return MeasuredSets(engine, text, file, key, say=progress.say)

    why = {"plus": bool(protected), "calibration": first.record, "settings": settings}
    why |= {"objective": objective.text} if objective is not None else {}
    free = [place for place, block in enumerate(checkpoint.original_blocks) if block not in protected]
    with contextlib.ExitStack() as using:
        engine = using.enter_context(contextlib.closing(choose_engine(checkpoint, first.windows[own], how)))
        settings["memory"] = engine.memory
        using.enter_context(together(process))
        settings["linear"] = using.enter_context(computing(how.dtype, place, options.cpu_kernels))
        choosing = measured(engine, first, "choosing", work)
        judging = measured(engine, second, "judging", work)
        sets = SetSearch(checkpoint, selection, free, choosing, judging, progress, objective)
        sets.rescoring = using.enter_context(_rescoring(sets, first, work, options))
        yield sets, why


@contextlib.contextmanager
def _rescoring(
    sets: SetSearch, text: CalibrationSet, work: Path | None, options: ScoreOptions
) -> Iterator[Rescoring | None]:
    """Within, what scores again after each block, on the windows that choose; None where losses are measured.

    Raises:
        UsageError: several processes share the windows.
    """
    if sets.selection.rescore is None:
        yield None
        return
    criterion, process = parse_rescore(sets.selection.rescore), sets.choosing.process
    if process.world > 1:
        raise UsageError(
            f"--rescore {criterion.name}: runs in one process, found {process.world}",
            hint="run it without torchrun or accelerate",
        )

    def score(checkpoint: Checkpoint) -> CriterionScores:
        scores = score_windows(checkpoint, text, [criterion], options=options, progress=sets.progress)
        return scores.criterion(criterion.name)

    key = {**sets.choosing.key, "criterion": criterion.name, "free": list(sets.blocks(sets.free))}
    with contextlib.nullcontext(work) if work is not None else tempfile.TemporaryDirectory() as folder:
        yield Rescoring(sets.checkpoint, sets.blocks(sets.free), score, Path(folder), key, sets.progress)


def _dtype(
    selection: Selection, options: ScoreOptions, stored: str, place: torch.device, progress: Progress
) -> torch.dtype:
    """What is computed in. Differences of gradients need float32.

    Raises:
        UsageError: less was requested.
    """
    if selection.kind != "gate":
        return pick_scoring_dtype(options.dtype, stored, place, say=progress.say)
    if options.dtype not in ("auto", "float32", "float64"):
        raise UsageError(
            f"--dtype {options.dtype}: --selection {selection.name} takes differences of gradients, which need float32",
            hint="leave --dtype out",
        )
    return pick_dtype("float32" if options.dtype == "auto" else options.dtype, stored, place)
