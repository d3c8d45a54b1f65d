"""Find the set of blocks that costs least when it goes: a search measures sets whole, and other windows judge its choice.

Legend: S sets, W windows, N blocks.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.artifacts.plan import PrunePlan
from shortstack.artifacts.protected import protected_blocks
from shortstack.artifacts.provenance import versions
from shortstack.checkpoint.drop_blocks import reason_against
from shortstack.checkpoint.forecast import Forecast
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.formatting import parse_size, ranges
from shortstack.common.json_text import json_text
from shortstack.common.options import stage
from shortstack.common.progress import Progress
from shortstack.data.calibration import CalibrationOptions, CalibrationSet, check_enough, check_windows
from shortstack.data.preview import preview
from shortstack.engine.select import EngineOptions
from shortstack.errors import ShortstackError, UsageError, did_you_mean
from shortstack.families.open_model import open_model
from shortstack.pruning.options import BlockChoice, SearchOptions
from shortstack.pruning.plan import amount_to_remove, first_that_may_go, planned, too_many
from shortstack.runtime.atomic_output import check_writable_file, locked, write_json
from shortstack.runtime.devices import pick_device
from shortstack.runtime.distributed import Process, together
from shortstack.runtime.libraries import import_transformers
from shortstack.scoring.options import ScoreOptions
from shortstack.scoring.score import calibration_windows

if TYPE_CHECKING:
    import torch

    from shortstack.engine.removal_sets import RemovalSet
    from shortstack.scoring.search.beam import Ranked
    from shortstack.scoring.search.measured_sets import MeasuredSets

_CALIBRATION, _SEARCH, _OPTIONS = CalibrationOptions(), SearchOptions(), ScoreOptions()
SELECTIONS = ("one-shot", "contiguous", "greedy", "beam", "evolution")
_ALTERNATIVES = 2  # that are judged beside the chosen set


@dataclass(frozen=True)
class Selection:
    """How sets are searched.

    Attributes:
        name: as the user wrote it, such as `beam:4`.
        kind: one of SELECTIONS.
        width: sets that go on to the next step of a beam.
        generations: of the evolutionary search.
    """

    name: str
    kind: str
    width: int = 1
    generations: int = 20


def parse_selection(text: str) -> Selection:
    """`beam:4` -> a beam of four sets; `evolution:50` -> fifty generations.

    Raises:
        UsageError: no such selection, or a number that is not wanted or out of range.
    """
    kind, colon, number = text.partition(":")
    if kind not in SELECTIONS:
        raise UsageError(f"--selection {text!r}: no such selection", hint=did_you_mean(kind, SELECTIONS))
    if not colon:
        return Selection(text, kind, width=4 if kind == "beam" else 1)
    if kind not in ("beam", "evolution"):
        raise UsageError(f"--selection {text!r}: {kind} takes no number", hint=kind)
    if not re.fullmatch(r"\d{1,5}", number) or int(number) < 1:
        what = "sets that go on to the next step" if kind == "beam" else "generations"
        raise UsageError(f"--selection {text!r}: expected the number of {what} after the colon", hint=f"{kind}:4")
    return Selection(text, kind, **{"width" if kind == "beam" else "generations": int(number)})


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
        model: a checkpoint directory, a hub id such as `org/name@revision`, or `embedded`.
        out: write the plan here (plan.json); a search that was killed resumes when it is started again.
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
    if "quantization_config" in checkpoint.config:
        raise ShortstackError(
            f"{checkpoint.source}: is quantized; sets are measured on full weights",
            hint="search the checkpoint it was made from; the blocks are the same",
        )
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


@dataclass
class _Judged:
    """A set, and what the model costs without it on windows that chose nothing."""

    by: str
    removed: RemovalSet
    nll_W: torch.Tensor | None = None


@dataclass
class _Search:
    """One search on an opened model.

    Attributes:
        free: positions of the blocks that may go.
        choosing, judging: measure sets, on the windows that choose and on the others.
        refused: sets that cannot go exactly, and why.
    """

    checkpoint: Checkpoint
    selection: Selection
    choice: BlockChoice
    free: Sequence[int]
    protected: tuple[int, ...]
    choosing: MeasuredSets
    judging: MeasuredSets
    progress: Progress
    refused: dict[RemovalSet, str] = field(default_factory=dict)

    def run(self) -> tuple[list[_Judged], dict[str, Any]]:
        """The chosen set and alternatives, judged; and what is recorded of the way there."""
        dense, order = self._one_by_one()
        blocks, sizes = self.checkpoint.original_blocks, self.checkpoint.block_parameters()
        wanted = amount_to_remove([sizes[place] for place in order], self.checkpoint.parameters(), self.choice)
        limit = min(len(self.free), self.checkpoint.depth - 1)
        if wanted > limit:
            raise too_many(wanted, limit, self.checkpoint, self.protected, blocks)
        one_shot = self._one_shot(order, wanted)
        ranked = self._ranked(wanted, one_shot)
        self._say_refused()
        names = [self.selection.name, *(f"{self.selection.name}, {place}" for place in ("second", "third"))]
        found = [_Judged(name, removed) for name, removed in zip(names, ranked, strict=False)]
        if one_shot not in ranked[:1]:
            found = [*found[:_ALTERNATIVES], _Judged("one-shot", one_shot)]
        nll_SW = self.judging.nll([frozenset(), *(one.removed for one in found)])
        for one, nll_W in zip(found, nll_SW[1:], strict=True):
            one.nll_W = nll_W - nll_SW[0]
        singles = self.choosing.nll([frozenset({place}) for place in sorted(ranked[0])]).mean(dim=1)
        record = {
            "dense_ppl": math.exp(float(nll_SW[0].mean())),
            "added_up": math.expm1(float((singles - dense).sum())),
            "sets_measured": self.choosing.known,
        }
        return found, record

    def _one_by_one(self) -> tuple[float, list[int]]:
        """The dense model's loss, and the blocks that may go by what each costs alone, the cheapest first."""
        alone = [frozenset({place}) for place in self.free]
        costs = self.choosing.nll([frozenset(), *alone]).mean(dim=1).tolist()
        order = sorted(range(len(self.free)), key=lambda number: (costs[number + 1], number))
        return costs[0], [self.free[number] for number in order]

    def _one_shot(self, order: Sequence[int], wanted: int) -> RemovalSet:
        blocks = self.checkpoint.original_blocks
        removed, passed_by = first_that_may_go(self.checkpoint, [blocks[place] for place in order], wanted)
        if passed_by:
            self._reason_against(frozenset(order[:wanted]))
        return frozenset(self.checkpoint.position_of(block) for block in removed)

    def _ranked(self, wanted: int, one_shot: RemovalSet) -> list[RemovalSet]:
        """The sets of that size that were measured, the cheapest first."""
        from shortstack.scoring.search.beam import beam
        from shortstack.scoring.search.evolution import Evolution, evolve

        if self.selection.kind == "one-shot" or not wanted:
            return [one_shot]
        if self.selection.kind == "contiguous":
            runs = [frozenset(range(first, first + wanted)) for first in range(self.checkpoint.depth - wanted + 1)]
            return self._cheapest([run for run in runs if run <= set(self.free)], wanted)
        if self.selection.kind == "evolution":
            ranked = evolve(
                lambda sets, windows: self.choosing.nll(sets, windows).mean(dim=1),
                one_shot,
                self.free,
                self.choosing.windows,
                how=Evolution(generations=self.selection.generations),
                reason_against=self._reason_against,
                on_generation=lambda number, best, cost: self.progress.say(
                    f"generation {number + 1}: {self._blocks(best)} at {math.exp(cost):.4g}"
                ),
            )
        else:
            steps = beam(
                lambda sets: self.choosing.nll(sets).mean(dim=1),
                self.free,
                wanted,
                width=self.selection.width,
                reason_against=self._reason_against,
                on_step=self._say_step,
            )
            ranked = steps[-1]
            if len(steps) < wanted or not ranked.sets:
                raise self._no_set(wanted, ranked)
        return list(ranked.sets)

    def _cheapest(self, sets: Sequence[RemovalSet], wanted: int) -> list[RemovalSet]:
        possible = [removed for removed in sets if self._reason_against(removed) is None]
        if not possible:
            raise ShortstackError(
                f"{self.checkpoint.source}: no run of {wanted} adjacent blocks can go",
                hint="remove fewer, --no-plus, or --selection greedy",
            )
        costs = self.choosing.nll(possible).mean(dim=1).tolist()
        return [possible[place] for place in sorted(range(len(possible)), key=lambda place: (costs[place], place))]

    def _no_set(self, wanted: int, ranked: Ranked) -> ShortstackError:
        why = next(iter(ranked.skipped.values()), "")
        return ShortstackError(
            f"{self.checkpoint.source}: no {wanted} blocks can go exactly: {why}", hint="remove fewer"
        )

    def _say_step(self, ranked: Ranked) -> None:
        if ranked.sets:
            self.progress.say(
                f"{len(ranked.sets[0])} gone: {self._blocks(ranked.sets[0])}, perplexity {math.exp(ranked.costs[0]):.4g}"
            )

    def _reason_against(self, removed: RemovalSet) -> str | None:
        """Why a set cannot go from this family, or None; what was refused is kept, to be said in the end."""
        kept = [place for place in range(self.checkpoint.depth) if place not in removed]
        reason = reason_against(self.checkpoint, kept)
        if reason is not None:
            self.refused[removed] = reason
        return reason

    def _say_refused(self) -> None:
        if self.refused:
            one, why = next(iter(self.refused.items()))
            self.progress.say(
                f"{len(self.refused)} sets of blocks cannot go exactly and were not measured, such as "
                f"{self._blocks(one)}: {why}"
            )

    def _blocks(self, removed: Collection[int]) -> str:
        return ranges([self.checkpoint.original_blocks[place] for place in sorted(removed)])


def _searched(
    checkpoint: Checkpoint,
    drawn: CalibrationSet,
    selection: Selection,
    choice: BlockChoice,
    options: ScoreOptions,
    work: Path | None,
    progress: Progress,
) -> PrunePlan:
    import_transformers()
    from shortstack.engine.cpu import chosen_dtype
    from shortstack.engine.forward import windows_tensor
    from shortstack.engine.select import choose_engine
    from shortstack.scoring.search.measured_sets import MeasuredSets

    process = Process.from_environment()
    protected, note = protected_blocks(checkpoint.original_blocks, choice.plus)
    check_windows(checkpoint, drawn.windows)
    half = len(drawn.windows) // 2
    own, place = process.part(half), process.own_device(pick_device(options.device))
    memory_bytes = parse_size(options.memory_limit, "--memory-limit") if options.memory_limit is not None else None
    how = EngineOptions(
        chosen_dtype(options.dtype, checkpoint, place, 0.0, say=progress.say),
        place,
        options.memory,
        trust_remote_code=options.trust_remote_code,
        memory_bytes=memory_bytes,
        say=progress.say,
    )
    engine = choose_engine(checkpoint, drawn.windows[:half][own], how)
    settings = {"dtype": str(how.dtype).removeprefix("torch."), "device": str(place), "memory": engine.memory}

    def on(windows: Sequence[Sequence[int]], what: str) -> MeasuredSets:
        key = {
            "fingerprint": checkpoint.fingerprint,
            "windows": hashlib.sha256(json_text(windows).encode()).hexdigest(),
            **settings,
            "versions": versions(),
        }
        file = work / f"{what}.jsonl" if work is not None and process.world == 1 else None
        return MeasuredSets(engine, windows_tensor(windows[own], place), len(windows), process, file, key)

    with contextlib.closing(engine), together(process):
        one = _Search(
            checkpoint,
            selection,
            choice,
            [position for position, block in enumerate(checkpoint.original_blocks) if block not in protected],
            protected,
            on(drawn.windows[:half], "choosing"),
            on(drawn.windows[half:], "judging"),
            progress,
        )
        found, record = one.run()
    why = {
        "strategy": selection.name,
        "plus": bool(protected),
        "measured": {**record, "sets": [_shown(checkpoint, one) for one in found]},
        "calibration": drawn.first(half).record,
        "settings": settings,
    }
    blocks = [checkpoint.original_blocks[position] for position in sorted(found[0].removed)]
    return planned(checkpoint, tuple(blocks), protected=protected, criterion=selection.name, why=why, note=note).plan


def _shown(checkpoint: Checkpoint, judged: _Judged) -> dict[str, Any]:
    """What is recorded of a set: how much larger the perplexity is, as a share, with its error over windows."""
    assert judged.nll_W is not None
    windows, mean = len(judged.nll_W), float(judged.nll_W.mean())
    error = float(judged.nll_W.std(correction=1)) / math.sqrt(windows) * math.exp(mean) if windows > 1 else None
    return {
        "by": judged.by,
        "removed": [checkpoint.original_blocks[place] for place in sorted(judged.removed)],
        "increase": math.expm1(mean),
        "stderr": error,
    }


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
