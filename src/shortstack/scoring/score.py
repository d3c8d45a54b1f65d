"""Plan the fewest sweeps for the requested criteria, run them, return Scores."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from shortstack.artifacts.csv_folder import check_csv_folder
from shortstack.artifacts.scores import CriterionScores, Scores
from shortstack.artifacts.scores_csv import write_scores_csv
from shortstack.checkpoint.forecast import Forecast
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.clock import command_seconds
from shortstack.common.docstrings import filled
from shortstack.common.formatting import parse_blocks, parse_size, ranges
from shortstack.common.option_values import Listed
from shortstack.common.options import refuse_idle, stage, takes_fields
from shortstack.common.progress import Progress
from shortstack.common.source_names import SELF
from shortstack.data.calibration import CalibrationOptions, CalibrationSet, check_windows, draw_windows
from shortstack.data.named_sources import joined_sets, named_sources, preview_calibration
from shortstack.data.sources import read_corpus
from shortstack.data.tokenizer import load_tokenizer
from shortstack.engine.select import EngineOptions
from shortstack.errors import ShortstackError, UsageError
from shortstack.families.open_model import open_model
from shortstack.runtime.atomic_output import check_writable_file
from shortstack.runtime.devices import pick_device, pick_scoring_dtype
from shortstack.runtime.distributed import Process, together
from shortstack.runtime.libraries import import_transformers
from shortstack.runtime.memory import peak_rss_bytes
from shortstack.runtime.workspace import workspace
from shortstack.scoring.criteria import CRITERIA, RequestedCriterion, criteria_text, parse_criteria
from shortstack.scoring.early_stopping import Rounds
from shortstack.scoring.options import ScoreOptions, StoppingOptions, SweepRequest
from shortstack.scoring.self_text import self_windows
from shortstack.scoring.shared_windows import SharedWindows

_CALIBRATION, _STOPPING, _OPTIONS, _REQUEST = CalibrationOptions(), StoppingOptions(), ScoreOptions(), SweepRequest()
_CALIBRATION_BYTES = 32 << 20  # of text that windows are drawn from: at least this much, and enough for all of them


@stage
@filled(criteria=criteria_text())
def score(
    model: str,
    *,
    out: Path | None = None,
    criterion: Listed = "ppl",
    calibration: CalibrationOptions = _CALIBRATION,
    blocks: Listed | None = None,
    csv: Path | None = None,
    stopping: StoppingOptions = _STOPPING,
    options: ScoreOptions = _OPTIONS,
) -> Scores:
    """Measure how much each block matters. Blocks with lower scores are removed first.

    Unless the model is small, only two blocks are in memory: the current one and the next, which is read ahead.
    Processes that torchrun or accelerate started together share the windows; the first one writes.

    Source: Shortened LLaMA (Kim et al. 2024, arXiv 2402.02834) for `ppl`, `taylor`, `magnitude` and the windows.
    docs/how-it-works.md has the formulas.

    Args:
        model: The checkpoint: a directory, a hub id such as `org/name@revision`, or `embedded`.
        out: Write the scores to this file (scores.json).
        criterion: The criteria, separated by commas: {criteria}; with parameters such as `taylor:p=2,weight=sum`; `all`
            for every criterion. Criteria that are requested together share their passes over the weights.
        calibration: the windows.
        blocks: Score only these blocks, such as `3,7-9`. A plan made with the scores keeps the others.
        csv: Write the published CSV files into this folder: for each criterion block_order.csv and the scores, sorted
            and unsorted, per block and per tensor.
        stopping: when there are enough windows.
        options: how the run computes.

    Returns:
        The scores of every criterion.

    Raises:
        ShortstackError: the checkpoint cannot be read, there is too little text, or a score is not finite.
    """
    criteria = parse_criteria(criterion)
    memory_bytes = parse_size(options.memory_limit, "--memory-limit") if options.memory_limit is not None else None
    _check_until(stopping, criteria, calibration)
    if out is not None:
        check_writable_file(Path(out))
    else:
        refuse_idle(options, ["save_every"], "without --out")
    check_csv_folder(csv)
    process = Process.from_environment()
    progress = Progress(quiet=options.quiet or not process.leads)
    checkpoint = open_model(model, allow_links=options.allow_links, tokenizer=options.tokenizer, progress=progress)
    candidates = None if blocks is None else _candidates(checkpoint, blocks, csv)
    if checkpoint.repair is not None:
        progress.say(checkpoint.repair.says)
    windows = None
    if any(asked.needs_windows for asked in criteria):
        windows = calibration_windows(checkpoint, calibration, stopping=stopping, options=options, progress=progress)
    elif calibration != CalibrationOptions() or options.tokenizer is not None:
        progress.say(f"{criterion} needs only the weights, so the options of calibration text have no effect")
    with workspace(out, leads=process.leads) as work:
        rounds = None if stopping.until is None else Rounds(calibration.samples, stopping.remove or 0, stopping.plus)
        request = SweepRequest(candidates, rounds, memory_bytes)
        scores = _scored(
            checkpoint, windows, criteria, request=request, options=options, progress=progress, work_folder=work
        )
        scores = replace(scores, seconds=command_seconds())
        if out is not None and process.leads:
            scores.save(out)
    if csv is not None and process.leads:
        total = checkpoint.parameters()
        without = [total - size for size in checkpoint.block_parameters()]
        write_scores_csv(scores, csv, without, checkpoint.anatomy.prefix)
    return scores


def calibration_windows(
    checkpoint: Checkpoint,
    calibration: CalibrationOptions,
    *,
    stopping: StoppingOptions = _STOPPING,
    options: ScoreOptions = _OPTIONS,
    progress: Progress,
    is_one_of_several: bool = False,
) -> CalibrationSet:
    """The windows, drawn; with rounds as many as all of them may need.

    Args:
        is_one_of_several: it is a named source: what holds no chats or instructions leaves the options about them out.

    Raises:
        ShortstackError: there is too little text, or it cannot be read.
    """
    named = named_sources(calibration.data)
    if named:
        of_sources = {
            name: calibration_windows(
                checkpoint,
                replace(calibration, data=source),
                options=options,
                progress=progress,
                is_one_of_several=True,
            )
            for name, source in named.items()
        }
        return joined_sets(calibration, of_sources)
    samples = calibration.samples if stopping.until is None else stopping.max_samples
    if calibration.data.startswith(SELF):
        return self_windows(checkpoint, calibration, stopping, options, progress)
    # The published procedure draws among all rows, however many there are; the default needs no more text than this.
    enough = max(_CALIBRATION_BYTES, 400 * samples * calibration.seq_len)
    published = calibration.sampling == "published"
    corpus = read_corpus(
        calibration.data,
        role="calibration",
        limit_bytes=None if published else enough,
        counted_beyond=_CALIBRATION_BYTES if published else None,
        answered=True,
        progress=progress,
    )
    tokenizer = None if corpus.windows else load_tokenizer(checkpoint, trust_remote_code=options.trust_remote_code)
    wanted = replace(calibration, samples=samples // max(1, calibration.samples) * calibration.samples)
    if is_one_of_several:
        wanted = replace(wanted, chat_template=wanted.chat_template and bool(corpus.chats))
    elif calibration.count_prompts and not (corpus.chats or corpus.instructions):
        raise ShortstackError(
            f"{corpus.source}: no rows of chats or instructions for --count-prompts", hint="leave the option out"
        )
    fewest = None if stopping.until is None else calibration.samples
    drawn = draw_windows(corpus, tokenizer, options=wanted, fewest=fewest)
    if tokenizer is None and checkpoint.tokenizer is not None:
        progress.say(f"{corpus.source} holds token ids: --tokenizer has no effect")
    return drawn if tokenizer is None else drawn.read_by(checkpoint.tokenizer)


def _candidates(checkpoint: Checkpoint, blocks: str, csv: Path | None) -> tuple[int, ...]:
    """Positions of the blocks that are to be scored."""
    if csv is not None:
        raise UsageError("--csv with --blocks: a block_order.csv names every block", hint="leave one of them out")
    asked = sorted(set(parse_blocks(blocks)))
    unknown = sorted(set(asked).difference(checkpoint.original_blocks))
    if unknown:
        raise UsageError(
            f"--blocks {blocks}: {checkpoint.source} has no block {unknown[0]}, only {ranges(checkpoint.original_blocks)}"
        )
    return tuple(checkpoint.position_of(index) for index in asked)


def _check_until(stopping: StoppingOptions, criteria: Sequence[RequestedCriterion], text: CalibrationOptions) -> None:
    if stopping.until is None:
        if stopping.remove is not None or stopping.plus is not None:
            option = "--remove" if stopping.remove is not None else "--plus"
            raise UsageError(
                f"{option}: no effect without --until stable", hint="leave it out; use it with plan or prune"
            )
        refuse_idle(stopping, ["max_samples"], "without --until stable")
        return
    if stopping.remove is None:
        raise UsageError("--until stable needs the number of blocks to remove", hint="such as --remove 6")
    if len(criteria) > 1 or criteria[0].needs != {"branches"}:
        fitting = [name for name, row in CRITERIA.items() if row.needs == {"branches"}]
        raise UsageError(
            f"--until stable: for {' or '.join(fitting)} only, which has a loss for every window",
            hint=f"--criterion {fitting[0]}",
        )
    if named_sources(text.data):
        raise UsageError("--until stable: supports one source, but --data names several", hint="leave one of them out")
    if stopping.max_samples < 2 * text.samples:
        raise UsageError(
            f"--max-samples {stopping.max_samples}: expected at least two rounds of --samples {text.samples}"
        )


def _scored(
    checkpoint: Checkpoint,
    calibration: CalibrationSet | None,
    criteria: Sequence[RequestedCriterion],
    *,
    request: SweepRequest = _REQUEST,
    options: ScoreOptions = _OPTIONS,
    progress: Progress | None = None,
    work_folder: Path | None = None,
) -> Scores:
    """Score the blocks of a checkpoint on given windows: what `score` does after reading its options.

    Args:
        calibration: windows of token ids; None where every criterion needs weights alone.
        request: which blocks, on how many windows, in how much memory.
        options: how the run computes.
        work_folder: where the state of the run is saved, so that one that is killed can be continued; the caller
            removes it once the scores are safe.

    Raises:
        ShortstackError: windows that the model cannot take, or a score that is not finite.
    """
    import_transformers()
    from shortstack.scoring.runner import ScoringRun

    started = time.perf_counter()
    progress = progress or Progress(quiet=True)
    process = Process.from_environment()
    if "quantization_config" in checkpoint.config:
        raise ShortstackError(
            f"{checkpoint.source}: is quantized; scores are computed on full-precision weights",
            hint="score the checkpoint before quantization; the order is valid for both",
        )
    place = process.own_device(pick_device(options.device))
    windows = None
    if calibration is not None:
        check_windows(checkpoint, calibration.windows)
        process.part(len(calibration.windows))  # raises where there are too few
        windows = SharedWindows(calibration.windows, process, calibration.places, calibration.counted)
    if work_folder is not None and process.world > 1:
        work_folder = work_folder / f"process-{process.rank}"
    stored = checkpoint.tensors[checkpoint.anatomy.embedding].dtype
    engine = EngineOptions(
        pick_scoring_dtype(options.dtype, stored, place, say=progress.say),
        place,
        options.memory,
        request.stream_bytes,
        trust_remote_code=options.trust_remote_code,
        memory_bytes=request.memory_bytes,
        keeps_inputs=any(asked.needs & {"gradients", "states"} for asked in criteria),
        shows_hidden=any("hidden" in asked.needs for asked in criteria),
        candidates=request.candidates,
        say=functools.cache(progress.say),  # each line once, however often the run is tried again
    )
    run = ScoringRun(
        checkpoint,
        windows,
        criteria,
        progress,
        work_folder,
        options.save_every,
        options.cpu_kernels,
        process,
        request.rounds,
    )
    with together(process):
        run.run(engine)
    _check_finite(checkpoint, run.found)
    if run.stability is not None and calibration is not None:
        run.settings["until"] = run.stability.to_json()
        calibration = calibration.first(run.stability.windows[-1])
    return Scores(
        source=checkpoint.source,
        fingerprint=checkpoint.fingerprint,
        blocks=checkpoint.original_blocks,
        criteria=run.found,
        calibration=calibration.record if calibration is not None else {"source": "none", "samples": 0, "seq_len": 0},
        settings=run.settings,
        seconds=time.perf_counter() - started,
        peak_rss_bytes=peak_rss_bytes(),
    )


score_windows = takes_fields(_scored)  # for callers that name fields of the records


def _check_finite(checkpoint: Checkpoint, found: dict[str, CriterionScores]) -> None:
    for name, criterion in found.items():
        broken = [
            index for index, value in zip(criterion.blocks, criterion.scores, strict=True) if not math.isfinite(value)
        ]
        if broken:
            raise ShortstackError(
                f"{checkpoint.source}: the {name} score of block {broken[0]} is not finite",
                hint="use --dtype float32 or bfloat16; if it fails too, the weights are damaged (shortstack check)",
            )


def check_score(values: Mapping[str, Any]) -> list[str]:
    """Look at what a run would read, before it runs; lines about what could not be looked at.

    Raises:
        ShortstackError: an unknown criterion, a text that cannot be used, or windows longer than the model takes.
    """
    criteria = parse_criteria(values.get("criterion", "ppl"))
    given = {field.name: values[field.name] for field in fields(_STOPPING) if field.name in values}
    calibration = replace(
        _CALIBRATION, **{one.name: values[one.name] for one in fields(_CALIBRATION) if one.name in values}
    )
    _check_until(replace(_STOPPING, **given), criteria, calibration)
    if not any(criterion.needs_windows for criterion in criteria):
        return []
    notes = preview_calibration(calibration)
    model: Forecast | None = values.get("model")
    if model is not None:
        model.check_positions("seq_len", calibration.seq_len)
    return notes
