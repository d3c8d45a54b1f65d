"""PrunePlan -> new checkpoint, by byte copy. Neither torch nor transformers is imported, except to verify."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from shortstack.artifacts.plan import PrunePlan
from shortstack.artifacts.provenance import PLAN_FILE, versions
from shortstack.artifacts.sources import PlanSource
from shortstack.checkpoint.adapter import carry_adapter
from shortstack.checkpoint.byte_copy import TensorCopy, copy_tensors, new_header, write_hashed
from shortstack.checkpoint.drop_blocks import Cut, dropped_further_prediction
from shortstack.checkpoint.headers import INDEX, PICKLED_SINGLE, SINGLE, raw_header
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.clock import command_seconds
from shortstack.common.formatting import count, ranges, seconds, size, table
from shortstack.common.json_text import json_text
from shortstack.common.options import refuse_idle, stage
from shortstack.common.progress import Progress
from shortstack.common.shown import Shown
from shortstack.data.calibration import CalibrationOptions
from shortstack.errors import UsageError
from shortstack.families.open_model import open_model
from shortstack.pruning.opened_search import check_measurable
from shortstack.pruning.options import BlockChoice, Budget, PruneChoice, PruneOptions, SearchOptions
from shortstack.pruning.plan import PlannedCut, open_plan, plan_for
from shortstack.pruning.rescoring import Between
from shortstack.pruning.search import check_choice, searched
from shortstack.publishing.model_card import write_beside_weights
from shortstack.runtime.atomic_output import check_output, published
from shortstack.runtime.workspace import workspace
from shortstack.scoring.options import ScoreOptions

_CHOICE, _OPTIONS, _CALIBRATION, _MEASURING = PruneChoice(), PruneOptions(), CalibrationOptions(), ScoreOptions()


@dataclass(frozen=True, repr=False)
class PruneResult(Shown):
    """The pruned checkpoint that was written.

    Attributes:
        out: The new checkpoint.
        plan: The plan: which blocks were removed, and why.
        files: The sha256 of each file that was written, by its name.
        seconds: The wall-clock time in seconds.
        verified: The outcome of the comparison with the original, and what it left out; None if none was requested.
        logits_compared: Whether logits were compared, too; None if no comparison was requested.
        repaired: The repair at each cut (`places`) and the perplexities (`ppl`); None if none was requested.
    """

    out: Path
    plan: PrunePlan
    files: dict[str, str]
    seconds: float
    verified: str | None = None
    logits_compared: bool | None = None
    repaired: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "schema": 1,
            "out": str(self.out),
            "removed": list(self.plan.removed),
            "kept": list(self.plan.kept),
            "before": self.plan.before,
            "after": self.plan.after,
            "files": self.files,
            "seconds": self.seconds,
            "verified": self.verified,
            "logits_compared": self.logits_compared,
            **({"repaired": self.repaired} if self.repaired is not None else {}),
        }

    def to_text(self) -> str:
        """What a person reads on the terminal."""
        before, after = self.plan.before, self.plan.after
        rows = [("blocks", str(len(self.plan.blocks)), str(len(self.plan.kept)))]
        for key, show in (("parameters", count), ("bytes", size)):
            rows.append((key, show(before[key] or 0), show(after[key] or 0)))
        lines = [
            f"{self.out}: block{'' if len(self.plan.removed) == 1 else 's'} {ranges(self.plan.removed) or 'none'} of "
            f"{self.plan.source} removed "
            f"({self.plan.removal_ratio:.1%} of parameters) in {seconds(self.seconds)}",
            table(["", "before", "after"], rows),
            *self.plan.costs_text(),
        ]
        if self.repaired is not None:
            from shortstack.pruning.repair.text import repair_text

            lines += repair_text(self.repaired["places"], self.repaired["ppl"])
        if self.verified:
            lines.append(f"{'verified' if self.logits_compared else 'verified in part'}: {self.verified}")
        return "\n".join([*lines, *([self.plan.note] if self.plan.note else [])])


@stage
def prune(
    model: str,
    *,
    out: Path,
    plan: PlanSource | None = None,
    choice: BlockChoice = _CHOICE,
    calibration: CalibrationOptions = _CALIBRATION,
    adapter: Path | None = None,
    options: PruneOptions = _OPTIONS,
    measuring: ScoreOptions = _MEASURING,
) -> PruneResult:
    """Write a checkpoint without some of the blocks; every kept tensor keeps its bytes.

    Tokenizer, chat template, generation config and the other files are copied; the shards are those of the input. The
    output is complete or absent. With `selection` the blocks are chosen as by `shortstack search`, and the plan is
    written to OUT/plan.json; a killed search resumes. With `repair` a few tensors beside the cuts are changed.

    Args:
        model: The checkpoint: a directory, a hub id such as `org/name@revision`, or `embedded`.
        out: Write the checkpoint to this directory.
        plan: Remove the blocks of this plan.json, which `shortstack plan` or `shortstack search` wrote. Without it, the
            options below choose the blocks.
        choice: which blocks to remove.
        calibration: with `selection`, the windows that choose; as many again judge. With `repair`, those to fit on.
        adapter: Adapt this PEFT adapter, which was trained on the model. Its weights for the remaining blocks are
            written to OUT/adapter.
        options: how the checkpoint is written.
        measuring: with `selection` or `repair`, how models are run.

    Returns:
        What was written where.

    Raises:
        ShortstackError: the plan does not fit the checkpoint, the output cannot be written, or the verification failed.
    """
    search = _search_of(plan, choice, calibration, measuring, options)
    progress = Progress(quiet=measuring.quiet)
    checkpoint = open_model(model, allow_links=measuring.allow_links, tokenizer=measuring.tokenizer, progress=progress)
    inputs = [checkpoint.directory, *([adapter] if adapter else [])]
    if search is None:
        planned = open_plan(checkpoint, plan) if plan is not None else plan_for(checkpoint, choice)
    else:
        check_measurable(checkpoint)
        check_output(out, inputs=inputs, force=options.force)
    if options.repair is not None:
        from shortstack.pruning.repair.fitted import check_family

        check_family(checkpoint, options.repair)
    for line in (checkpoint.repair.says if checkpoint.repair else "", dropped_further_prediction(checkpoint)):
        if line:
            progress.say(line)
    says, logits, repaired = None, None, None
    with workspace(out) as work:
        if search is not None:
            planned = searched(
                checkpoint, calibration, search, measuring, progress, work,
                _repair_between(checkpoint, calibration, options, measuring),
            )  # fmt: skip
        nbytes = planned.plan.after["bytes"] or 0
        with published(out, inputs=inputs, nbytes=nbytes, force=options.force, is_locked=True) as folder:
            files = write_pruned(
                checkpoint, planned, folder, allow_nonfinite=options.allow_nonfinite, progress=progress
            )
            if search is not None:
                plan_text = json_text(planned.plan.to_json(), indent=1) + "\n"
                files[PLAN_FILE] = write_hashed(folder / PLAN_FILE, plan_text.encode())
            if adapter is not None:
                carried = carry_adapter(
                    Path(adapter), checkpoint, planned.cut.kept, str(out), folder / "adapter", progress
                )
                files |= {f"adapter/{name}": digest for name, digest in carried.items()}
            if options.verify:
                from shortstack.pruning.verify import verify_pruned

                says, logits = verify_pruned(checkpoint, planned, folder)
            if options.repair is not None:
                from shortstack.pruning.repair.repair import repaired_in

                how = (options.repair, calibration, measuring, progress)
                repaired, files, says = repaired_in(folder, str(out), checkpoint, planned.cut, files, how, says)
    return PruneResult(Path(out), planned.plan, files, command_seconds(), says, logits, repaired)


def _repair_between(
    dense: Checkpoint, calibration: CalibrationOptions, options: PruneOptions, measuring: ScoreOptions
) -> Between | None:
    """The repair of what each step of a search leaves; None where none was requested."""
    if not options.repair_between or options.repair is None:
        return None
    from shortstack.pruning.repair.repair import repair_in_place, windows_of

    method, windows = options.repair, windows_of(calibration)
    key = {"repair": method, "samples": windows.samples, "seq_len": windows.seq_len}
    return Between(lambda folder: repair_in_place(folder, dense, method, windows, measuring), key)


def _search_of(
    plan: PlanSource | None,
    choice: BlockChoice,
    calibration: CalibrationOptions,
    measuring: ScoreOptions,
    options: PruneOptions,
) -> SearchOptions | None:
    """The search that chooses the blocks; None where a plan, scores or the blocks themselves do.

    Raises:
        UsageError: options contradict one another, or have no effect.
    """
    selection, rescore = (choice.selection, choice.rescore) if isinstance(choice, PruneChoice) else (None, None)
    if rescore is not None and selection is None:
        raise UsageError(f"--rescore {rescore}: no effect without --selection greedy", hint="--selection greedy")
    if options.repair_between and (options.repair is None or rescore is None):
        raise UsageError(
            "--repair-between: no effect without --repair and --rescore",
            hint="--selection greedy --rescore ppl --repair auto --repair-between",
        )
    if plan is not None:
        if choice.amounts or choice.blocks is not None or choice.scores is not None or selection is not None:
            raise UsageError("--plan names the blocks; the other options contradict it", hint="give one of them")
        refuse_idle(choice, ["criterion", "plus", "strategy", "objective"], "with --plan, which names the blocks")
    if selection is None:
        why = "without --selection or --repair, which run the model"
        if options.repair is not None:
            refuse_idle(measuring, ["memory_limit", "save_every"], "without --selection, which measures sets of blocks")
            return None
        refuse_idle(calibration, [field.name for field in fields(CalibrationOptions)], why)
        used = ("allow_links", "quiet")
        refuse_idle(measuring, [field.name for field in fields(ScoreOptions) if field.name not in used], why)
        return None
    if choice.blocks is not None or choice.scores is not None:
        given = "--blocks" if choice.blocks is not None else "--scores"
        raise UsageError(f"--selection searches the blocks; {given} contradicts it", hint="give one of them")
    refuse_idle(choice, ["criterion", "strategy"], "with --selection, which measures sets of blocks")
    budget = {field.name: getattr(choice, field.name) for field in fields(Budget)}
    search = SearchOptions(selection=selection, rescore=rescore, **budget)
    check_choice(search)
    return search


def write_pruned(
    checkpoint: Checkpoint,
    planned: PlannedCut,
    directory: Path,
    *,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
) -> dict[str, str]:
    """Write the pruned checkpoint into an empty directory; return the sha256 of every file."""
    plan, cut = planned
    files = copy_weights(checkpoint, cut, directory, allow_nonfinite, progress or Progress(quiet=True))
    step = {
        "stage": "prune",
        "source": checkpoint.source,
        "fingerprint": checkpoint.fingerprint,
        "removed_blocks": list(plan.removed),
        "protected_blocks": list(plan.protected),
        "criterion": plan.criterion,
        "removal_ratio": plan.removal_ratio,
        "why": plan.why,
        **({"repairs": [checkpoint.repair.name]} if checkpoint.repair else {}),
        "before": plan.before,
        "after": plan.after,
        "versions": versions(),
    }
    return write_beside_weights(
        checkpoint,
        directory,
        config=cut.config,
        step=step,
        files=files,
        kept=cut.kept,
        progress=progress,
    )


def copy_weights(
    checkpoint: Checkpoint, cut: Cut, directory: Path, allow_nonfinite: bool, progress: Progress
) -> dict[str, str]:
    """Write the weight files, as many as the input has (fewer where a shard has nothing left), and their index.

    A tensor goes into the shard that it has in the input, wherever its bytes come from.

    Returns:
        sha256 of every file, by name.
    """
    by_shard: dict[Path, list[TensorCopy]] = {path: [] for path in checkpoint.shards}
    for copy in cut.tensors:
        by_shard[checkpoint.tensors[copy.source.name].file].append(copy)
    shards = [(path, copies) for path, copies in by_shard.items() if copies]
    single = len(checkpoint.shards) == 1 and next(iter(checkpoint.shards)).name in (SINGLE, PICKLED_SINGLE)
    files: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    total = sum(copy.nbytes for _, copies in shards for copy in copies)
    with progress.bar("copy", total, "B") as advance:
        for number, (path, copies) in enumerate(shards, start=1):
            name = SINGLE if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            header = new_header(copies, checkpoint.shards[path])
            if cut.is_whole(checkpoint.depth) and path.suffix == ".safetensors":
                header = raw_header(path)  # nothing removed: the file is copied to the byte
            files[name] = copy_tensors(
                copies, directory / name, header=header, allow_nonfinite=allow_nonfinite, progress=advance
            )
            weight_map |= {copy.name: name for copy in copies}
    if not single:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        files[INDEX] = write_hashed(directory / INDEX, (json_text(index, indent=2) + "\n").encode())
    return files
