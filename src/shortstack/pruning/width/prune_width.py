"""Checkpoint -> the same with fewer attention heads and MLP channels in every block, whole or not at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shortstack.artifacts.provenance import versions
from shortstack.artifacts.scores import Scores
from shortstack.checkpoint.drop_blocks import Cut
from shortstack.checkpoint.forecast import Estimate, Forecast, Passes
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.clock import command_seconds
from shortstack.common.formatting import count, ranges, seconds, size, table
from shortstack.common.options import stage
from shortstack.common.progress import Progress
from shortstack.common.shown import Shown
from shortstack.data.calibration import CalibrationOptions
from shortstack.data.preview import READ_BYTES, preview
from shortstack.data.sources import read_corpus
from shortstack.families.open_model import open_model
from shortstack.pruning.prune import copy_weights
from shortstack.pruning.width.options import WidthChoice, WriteOptions
from shortstack.pruning.width.shape import BlockShape, Width, chosen_width, shape_of
from shortstack.pruning.width.units import KeptUnits, UnitScores, kept_units, narrow_cut, parameters_of
from shortstack.publishing.model_card import write_beside_weights
from shortstack.runtime.atomic_output import check_output, published
from shortstack.runtime.distributed import Process
from shortstack.runtime.workspace import workspace
from shortstack.scoring.criteria import RequestedCriterion, Row
from shortstack.scoring.options import ScoreOptions, SweepRequest
from shortstack.scoring.score import calibration_windows, score_windows

_CHOICE, _CALIBRATION, _WRITE, _OPTIONS = WidthChoice(), CalibrationOptions(), WriteOptions(), ScoreOptions()
_NAME = "width"  # of the criterion
_ROW = Row("shortstack.pruning.width.salience:UnitSalience", frozenset({"gradients"}))


@dataclass(frozen=True, repr=False)
class WidthResult(Shown):
    """The narrower checkpoint that was written.

    Attributes:
        out: The new checkpoint.
        source: The checkpoint that it was made from.
        before: The original's parameters, block_parameters, bytes, heads, kv_heads, channels and kv_bytes_per_token.
        after: The same of the new checkpoint.
        calibration: The windows that the importance was computed on.
        files: The sha256 of each file that was written, by its name.
        seconds: The wall-clock time in seconds.
        peak_rss_bytes: The peak memory of the backward sweep in bytes.
        verified: The outcome of the comparison with the original; None if none was requested.
        says: What a user should know about the result.
    """

    out: Path
    source: str
    before: dict[str, int | None]
    after: dict[str, int | None]
    calibration: dict[str, Any]
    files: dict[str, str]
    seconds: float
    peak_rss_bytes: int
    verified: str | None = None
    says: list[str] = field(default_factory=list)

    @property
    def removal_ratio(self) -> float:
        """The removed share of the model's parameters, from 0 to 1."""
        return _lost(self.before, self.after, "parameters")

    @property
    def block_removal_ratio(self) -> float:
        """The removed share of the blocks' parameters, from 0 to 1."""
        return _lost(self.before, self.after, "block_parameters")

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "schema": 1,
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)},
            "out": str(self.out),
            "removal_ratio": self.removal_ratio,
            "block_removal_ratio": self.block_removal_ratio,
        }

    def table_rows(self) -> list[dict[str, Any]]:
        """One row for each model: before and after."""
        return [{"model": self.source, **self.before}, {"model": str(self.out), **self.after}]

    def to_text(self) -> str:
        """What a person reads on the terminal."""
        shows: dict[str, tuple[str, Callable[[int], str]]] = {
            "parameters": ("parameters", count), "block_parameters": ("of them in blocks", count), "bytes": ("bytes", size),
            "kv_bytes_per_token": ("KV cache per token", size), "heads": ("heads per block", str),
            "kv_heads": ("key-value heads", str), "channels": ("MLP channels", str),
        }  # fmt: skip
        rows = [
            (label, *("-" if side[key] is None else show(side[key] or 0) for side in (self.before, self.after)))
            for key, (label, show) in shows.items()
        ]
        lines = [
            f"{self.out}: {self.removal_ratio:.1%} of the parameters of {self.source} removed "
            f"({self.block_removal_ratio:.1%} of those of its blocks) in {seconds(self.seconds)}, with at most "
            f"{size(self.peak_rss_bytes)} of memory",
            table(["", "before", "after"], rows),
        ]
        return "\n".join([*lines, *([f"verified: {self.verified}"] if self.verified else []), *self.says])


def _lost(before: Mapping[str, int | None], after: Mapping[str, int | None], what: str) -> float:
    whole = before[what] or 0
    return (whole - (after[what] or 0)) / max(1, whole)


@stage
def prune_width(
    model: str,
    *,
    out: Path,
    choice: WidthChoice = _CHOICE,
    calibration: CalibrationOptions = _CALIBRATION,
    write: WriteOptions = _WRITE,
    options: ScoreOptions = _OPTIONS,
) -> WidthResult:
    """Write a checkpoint with fewer attention heads and MLP channels in every block, as a baseline for depth pruning.

    The same number of units is removed from every block, those with the least importance: |weight x gradient|, summed
    over all weights of a unit (LLM-Pruner, element-wise, first order). Gradients come from one backward sweep, block by
    block. Kept weights keep their bytes. The output is complete or absent.

    Source: LLM-Pruner (Ma et al. 2023, arXiv 2305.11627).

    Args:
        model: The checkpoint: a directory, a hub id such as `org/name@revision`, or `embedded`.
        out: Write the checkpoint to this directory.
        choice: how much goes.
        calibration: the windows.
        write: how it is written.
        options: how the gradients are computed.

    Returns:
        What was written where.

    Raises:
        ShortstackError: the family's config cannot express the width, no head or channel would be left, there is too
            little text, or the output cannot be written.
    """
    process = Process.from_environment()
    progress = Progress(quiet=options.quiet or not process.leads)
    checkpoint = open_model(model, allow_links=options.allow_links, tokenizer=options.tokenizer, progress=progress)
    if checkpoint.repair is not None:
        progress.say(checkpoint.repair.says)
    shape = shape_of(checkpoint)
    width = chosen_width(shape, checkpoint.parameters(), choice, checkpoint.source)
    check_output(out, inputs=[checkpoint.directory], force=write.force)
    with workspace(out, leads=process.leads) as work:
        scores = _importance(checkpoint, shape, calibration, options, progress, work)
        found = scores.criteria[_NAME]
        assert isinstance(found, UnitScores)
        kept = [kept_units(shape, width, found.units[index]) for index in range(checkpoint.depth)]
        cut = narrow_cut(checkpoint, shape, width, kept)
        before, after = _sizes(checkpoint, None, shape.whole), _sizes(checkpoint, cut, width)
        result = WidthResult(
            Path(out), checkpoint.source, before, after, scores.calibration, {}, 0.0, scores.peak_rss_bytes,
            says=_says(shape, width, checkpoint.parameters(), choice),
        )  # fmt: skip
        if process.leads:
            step = {**_step(checkpoint, choice, result), "removed": _removed(checkpoint, shape, kept)}
            result = _written(checkpoint, cut, result, step, write, progress)
    return dataclasses.replace(result, seconds=command_seconds())


def _importance(
    checkpoint: Checkpoint,
    shape: BlockShape,
    calibration: CalibrationOptions,
    options: ScoreOptions,
    progress: Progress,
    work: Path,
) -> Scores:
    """Scores whose one criterion has the importance of every unit, from one forward and one backward sweep."""
    windows = calibration_windows(checkpoint, calibration, options=options, progress=progress)
    windows = dataclasses.replace(windows, sources=())  # units are chosen for all sources together
    asked = RequestedCriterion(_NAME, _ROW, {"shape": shape})
    return score_windows(
        checkpoint, windows, [asked], request=SweepRequest(), options=options, progress=progress, work_folder=work
    )


def _sizes(checkpoint: Checkpoint, cut: Cut | None, width: Width) -> dict[str, int | None]:
    """What the checkpoint holds, or what its cut will."""
    block_of, kv_before = checkpoint.anatomy.block_of, checkpoint.kv_bytes_per_token()
    numbers = {"heads": width.heads, "kv_heads": width.kv_heads, "channels": width.channels}
    if cut is None:
        return {
            "parameters": checkpoint.parameters(),
            "block_parameters": sum(checkpoint.block_parameters()),
            "bytes": checkpoint.nbytes,
            **numbers,
            "kv_bytes_per_token": kv_before,
        }
    family = checkpoint.anatomy.family
    kv_heads = (
        family.text(checkpoint.config).get("num_key_value_heads")
        or family.text(checkpoint.config)["num_attention_heads"]
    )
    return {
        "parameters": parameters_of(checkpoint, cut.tensors),
        "block_parameters": parameters_of(
            checkpoint, (copy for copy in cut.tensors if block_of(copy.source.name) is not None)
        ),
        "bytes": sum(copy.nbytes for copy in cut.tensors),
        **numbers,
        "kv_bytes_per_token": None if kv_before is None else kv_before // kv_heads * width.kv_heads,
    }


def _says(shape: BlockShape, width: Width, parameters: int, choice: WidthChoice) -> list[str]:
    """What the choice of numbers could not do."""
    free = chosen_width(dataclasses.replace(shape, heads_divide_hidden=False), parameters, choice, "")
    if free.heads != width.heads:
        return [
            f"{width.heads} heads are kept, although {free.heads} would fit better: in this family the number of heads must "
            f"divide the hidden size of {shape.hidden}"
        ]
    if choice.only == "mlp" or width.heads != shape.heads:
        return []
    if choice.head_unit == "kv-groups" and shape.kv_heads == 1:
        return ["no head is removed: there is one key-value head; --head-unit query-heads removes only query heads"]
    return ["no head is removed: without one head the share would be further from that of the channels"]


def _step(checkpoint: Checkpoint, choice: WidthChoice, result: WidthResult) -> dict[str, Any]:
    """What shortstack.json says of it."""
    return {
        "stage": "prune-width",
        "source": checkpoint.source,
        "fingerprint": checkpoint.fingerprint,
        "criterion": "taylor, element-wise, first order, summed over units",
        "choice": dataclasses.asdict(choice),
        "why": {"scores": {"calibration": result.calibration}},
        "removal_ratio": result.removal_ratio,
        "block_removal_ratio": result.block_removal_ratio,
        **({"repairs": [checkpoint.repair.name]} if checkpoint.repair else {}),
        "before": result.before,
        "after": result.after,
        "versions": versions(),
    }


def _removed(checkpoint: Checkpoint, shape: BlockShape, kept: Sequence[KeptUnits]) -> dict[str, dict[str, str]]:
    """By block of the original model, the removed units, by their numbers in the checkpoint that this one was made from."""
    return {
        str(number): {
            "heads": ranges(set(range(shape.heads)).difference(units.queries)),
            "kv_heads": ranges(set(range(shape.kv_heads)).difference(units.kv_heads)),
            "channels": ranges(set(range(shape.channels)).difference(units.channels)),
        }
        for number, units in zip(checkpoint.original_blocks, kept, strict=True)
    }


def _written(
    checkpoint: Checkpoint, cut: Cut, result: WidthResult, step: dict[str, Any], write: WriteOptions, progress: Progress
) -> WidthResult:
    """The checkpoint on disk, and checked where that is requested."""
    verified = None
    nbytes = result.after["bytes"] or 0
    inputs = [checkpoint.directory]
    with published(result.out, inputs=inputs, nbytes=nbytes, force=write.force, is_locked=True) as folder:
        files = copy_weights(checkpoint, cut, folder, write.allow_nonfinite, progress)
        files = write_beside_weights(
            checkpoint, folder, config=cut.config, step=step, files=files, narrower=True, progress=progress
        )
        if write.verify:
            from shortstack.pruning.width.verify import verify_narrower

            verified = verify_narrower(checkpoint, cut, folder)
    return dataclasses.replace(result, files=files, verified=verified)


def check_prune_width(values: Mapping[str, Any]) -> list[str]:
    """Look at what would be read, before it runs; lines about what could not be looked at.

    Raises:
        ShortstackError: the model cannot be made narrower so, or the text cannot be used.
    """
    data = values.get("data", _CALIBRATION.data)
    notes = preview(data, "calibration", lambda: read_corpus(data, role="calibration", limit_bytes=READ_BYTES))
    model: Forecast | None = values.get("model")
    if model is not None:
        model.check_positions("seq_len", values.get("seq_len", _CALIBRATION.seq_len))
    return notes


def estimate_prune_width(values: Mapping[str, Any]) -> Estimate:
    """The checkpoint that width pruning makes.

    Raises:
        ShortstackError: the model cannot be made narrower so.
    """
    model: Forecast | None = values.get("model")
    if model is None or model.narrower != (0, 0):  # what an earlier step leaves of heads is not known before it runs
        return Estimate("checkpoint")
    names = {field.name for field in dataclasses.fields(WidthChoice)}
    choice = WidthChoice(**{name: value for name, value in values.items() if name in names})
    shape = dataclasses.replace(shape_of(model.checkpoint), blocks=len(model.kept))
    width = chosen_width(shape, model.parameters, choice, model.checkpoint.source)
    lost = shape.removed(width) // shape.blocks
    stored = model.checkpoint.blocks[0][0]
    forecast = dataclasses.replace(model, narrower=(lost, lost * stored.nbytes // max(1, stored.numel)))
    makes = f"{width.heads} heads, {width.channels} channels, {count(forecast.parameters)} parameters"
    tokens = values.get("samples", _CALIBRATION.samples) * values.get("seq_len", _CALIBRATION.seq_len)
    passes = Passes(model, 4 * tokens * len(model.kept), 4 * tokens)  # forwards, and a gradient
    return Estimate(makes, forecast.nbytes, forecast=forecast, passes=(passes,))
