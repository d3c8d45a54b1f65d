"""Searches for the cheapest set of blocks, on an opened model: what `search` and `curve` share.

Legend: S sets, W windows.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.artifacts.provenance import versions
from shortstack.artifacts.results import perplexity
from shortstack.checkpoint.drop_blocks import reason_against
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.formatting import named_blocks, parse_size, ranges
from shortstack.common.progress import Progress
from shortstack.data.calibration import CalibrationOptions, CalibrationSet, check_windows
from shortstack.engine.select import EngineOptions
from shortstack.errors import ShortstackError
from shortstack.families.open_model import open_model
from shortstack.pruning.budget import ceiling_nll
from shortstack.pruning.objective import Objective
from shortstack.pruning.plan import first_that_may_go
from shortstack.pruning.selection import Selection
from shortstack.pruning.source_costs import judged_change, objective_costs
from shortstack.runtime.atomic_output import check_writable_file
from shortstack.runtime.devices import pick_device, pick_scoring_dtype
from shortstack.runtime.distributed import Process, together
from shortstack.runtime.libraries import import_transformers
from shortstack.scoring.options import ScoreOptions
from shortstack.scoring.score import calibration_windows
from shortstack.scoring.shared_windows import SharedWindows

if TYPE_CHECKING:
    import torch

    from shortstack.engine.removal_sets import RemovalSet
    from shortstack.engine.select import Engine
    from shortstack.scoring.search.beam import Ranked
    from shortstack.scoring.search.measured_sets import MeasuredSets


@dataclass(frozen=True)
class Judged:
    """What the model costs without a set of blocks, on windows that chose nothing, beside the dense model.

    Attributes:
        by: what chose the set.
        removed: blocks of the original model.
        ppl: perplexity without them.
        increase: how much larger than the dense model's it is, as a share of that.
        stderr: standard error of the increase, over windows, paired; None for a single window.
        sources: the same (`ppl`, `increase`, `stderr`) of each named source.
    """

    by: str
    removed: tuple[int, ...]
    ppl: float
    increase: float
    stderr: float | None
    sources: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return {**vars(self), "removed": list(self.removed), "sources": dict(self.sources)}


@dataclass
class SetSearch:
    """Searches on one opened model.

    Attributes:
        free: positions of the blocks that may go.
        choosing, judging: measure sets, on the windows that choose and on the others.
        objective: what sets are chosen for, where the text has named sources; None for the loss over all tokens.
        refused: sets that cannot go exactly, and why.
        told: the best sets of steps that were told of: a step that is taken again is not.
    """

    checkpoint: Checkpoint
    selection: Selection
    free: Sequence[int]
    choosing: MeasuredSets
    judging: MeasuredSets
    progress: Progress
    objective: Objective | None = None
    refused: dict[RemovalSet, str] = field(default_factory=dict)
    told: set[RemovalSet] = field(default_factory=set)

    def order(self) -> list[int]:
        """The blocks that may go, by what each costs alone, the cheapest first."""
        costs = self.costs([frozenset(), *(frozenset({place}) for place in self.free)])[1:]
        return [
            self.free[number] for number in sorted(range(len(self.free)), key=lambda number: (costs[number], number))
        ]

    def costs(self, sets: Collection[RemovalSet]) -> list[float]:
        """What each set costs on the windows that choose: the mean NLL without it, or the objective's value."""
        found: list[float] = self._cost(sets).tolist()
        return found

    def _cost(self, sets: Collection[RemovalSet], windows: int | None = None) -> torch.Tensor:
        """The same on the first so many windows, [S]."""
        nll_SW = self.choosing.nll(sets, windows)
        if self.objective is None:
            return self.choosing.means(nll_SW)
        return objective_costs(self.objective, self.choosing, nll_SW, self.choosing.nll([frozenset()], windows))

    def _mean_nll(self, removed: RemovalSet) -> float:
        return float(self.choosing.means(self.choosing.nll([removed]))[0])

    def added_up(self, removed: RemovalSet) -> float:
        """What the perplexity would grow by, as a share, if each block of a set cost what it costs alone."""
        nll_SW = self.choosing.nll([frozenset(), *(frozenset({place}) for place in sorted(removed))])
        dense, *alone = self.choosing.means(nll_SW).tolist()
        return math.expm1(sum(alone) - len(alone) * dense)

    def one_shot(self, wanted: int) -> RemovalSet:
        """The blocks that cost least one by one."""
        order = self.order()
        blocks = self.checkpoint.original_blocks
        removed, passed_by = first_that_may_go(self.checkpoint, [blocks[place] for place in order], wanted)
        if passed_by:
            self._reason_against(frozenset(order[:wanted]))
        return frozenset(self.checkpoint.position_of(block) for block in removed)

    def ranked(self, wanted: int) -> list[RemovalSet]:
        """Sets of that many blocks, the chosen one first.

        Raises:
            ShortstackError: no such set can go exactly.
        """
        if self.selection.kind == "one-shot" or not wanted:
            return [self.one_shot(wanted)]
        if self.selection.kind == "contiguous":
            return self._runs(wanted)
        if self.selection.kind == "evolution":
            return list(self._evolved(wanted).sets)
        steps = self.steps(wanted)
        if len(steps) < wanted or not steps[-1].sets:
            why = next(iter(steps[-1].skipped.values()), "")
            raise ShortstackError(
                f"{self.checkpoint.source}: no {wanted} blocks can go exactly: {why}", hint="remove fewer"
            )
        return list(steps[-1].sets)

    def most_under(self, ceiling: str, limit: int) -> int:
        """How many blocks can go under a ceiling of perplexity: up to where the chosen set of one more is over it.

        Args:
            ceiling: such as `12.5`, or `1.2x` for 1.2 times the dense model's.
            limit: the most blocks.

        Raises:
            ShortstackError: no set keeps it.
        """
        dense = self._mean_nll(frozenset())
        most_nll, found, least = ceiling_nll(ceiling, dense), 0, None
        for size in range(1, limit + 1):
            try:
                chosen = self.ranked(size)[0]
            except ShortstackError:  # of this size none can go; of a larger one some may
                continue
            cost = self._mean_nll(chosen)
            least = least or f"; without {named_blocks(self.blocks(chosen))} it is {perplexity(cost):.4g}"
            if cost > most_nll:
                break
            found = size
        if not found:
            raise ShortstackError(
                f"--ppl-ceiling {ceiling}: no set of blocks of {self.checkpoint.source} keeps a perplexity of "
                f"{perplexity(most_nll):.4g} (the dense model's is {perplexity(dense):.4g}{least or ''})",
                hint="a higher ceiling" + ("" if self.selection.kind == "beam" else ", or --selection beam:4"),
            )
        return found

    def steps(self, most: int) -> list[Ranked]:
        """The sets of 1, 2, ... `most` blocks that a beam sees."""
        from shortstack.scoring.search.beam import beam

        return beam(
            self._cost,
            self.free,
            most,
            width=self.selection.width,
            reason_against=self._reason_against,
            on_step=self._say_step,
        )

    def judged(self, sets: Mapping[str, RemovalSet]) -> tuple[float, list[Judged]]:
        """The dense model's perplexity on windows that chose nothing, and there what each set costs, by its name."""
        dense_W, *nll_SW = self.judging.nll([frozenset(), *sets.values()])
        found = []
        for (name, removed), nll_W in zip(sets.items(), nll_SW, strict=True):
            whole, sources = judged_change(self.judging, nll_W, dense_W)
            found.append(Judged(name, self.blocks(removed), **whole, sources=sources))
        return perplexity(float(self.judging.means(dense_W[None])[0])), found

    def say_refused(self) -> None:
        """How many sets were passed by, and why."""
        if self.refused:
            one, why = next(iter(self.refused.items()))
            self.progress.say(
                f"{len(self.refused)} sets of blocks cannot go exactly and were not measured, such as "
                f"{ranges(self.blocks(one))}: {why}"
            )

    def blocks(self, removed: Collection[int]) -> tuple[int, ...]:
        """Numbers in the original model, of positions."""
        return tuple(self.checkpoint.original_blocks[place] for place in sorted(removed))

    def _runs(self, wanted: int) -> list[RemovalSet]:
        free = set(self.free)
        runs = [frozenset(range(first, first + wanted)) for first in range(self.checkpoint.depth - wanted + 1)]
        possible = [run for run in runs if run <= free and self._reason_against(run) is None]
        if not possible:
            raise ShortstackError(
                f"{self.checkpoint.source}: no run of {wanted} adjacent blocks can go",
                hint="remove fewer, --no-plus, or --selection greedy",
            )
        costs = self.costs(possible)
        return [possible[place] for place in sorted(range(len(possible)), key=lambda place: (costs[place], place))]

    def _evolved(self, wanted: int) -> Ranked:
        from shortstack.scoring.search.evolution import Evolution, evolve

        def say(number: int, best: RemovalSet, cost: float) -> None:
            self.progress.say(f"generation {number + 1}: {ranges(self.blocks(best))}, {self._cost_text(cost)}")

        return evolve(
            self._cost,
            self.one_shot(wanted),
            self.free,
            self.choosing.windows,
            how=Evolution(generations=self.selection.generations),
            reason_against=self._reason_against,
            on_generation=say,
        )

    def _say_step(self, ranked: Ranked) -> None:
        if ranked.sets and ranked.sets[0] not in self.told:
            self.told.add(ranked.sets[0])
            gone = self.blocks(ranked.sets[0])
            self.progress.say(f"without {named_blocks(gone)}: {self._cost_text(ranked.costs[0])}")

    def _cost_text(self, cost: float) -> str:
        if self.objective is None:
            return f"perplexity {perplexity(cost):.4g}"
        return f"{self.objective.text} of what is added: {cost:.4g}"

    def _reason_against(self, removed: RemovalSet) -> str | None:
        kept = [place for place in range(self.checkpoint.depth) if place not in removed]
        reason = reason_against(self.checkpoint, kept)
        if reason is not None:
            self.refused[removed] = reason
        return reason


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
            f"{checkpoint.source}: is quantized; sets are measured on full weights",
            hint="measure the checkpoint that it was made from; its blocks are the same",
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
    from shortstack.engine.forward import windows_tensor
    from shortstack.engine.select import choose_engine
    from shortstack.scoring.search.measured_sets import MeasuredSets

    process = Process.from_environment()
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
    half = len(first.windows)
    own, place = process.part(half), process.own_device(pick_device(options.device))
    stored = checkpoint.tensors[checkpoint.anatomy.embedding].dtype
    how = EngineOptions(
        pick_scoring_dtype(options.dtype, stored, place, say=progress.say),
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
        return MeasuredSets(engine, windows_tensor(text.own, place), half, process, file, key, text)

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
        yield SetSearch(checkpoint, selection, free, choosing, judging, progress, objective), why
