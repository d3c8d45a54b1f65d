"""The stability of a choice: the agreement of rankings between criteria, seeds, numbers of windows and sources."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shortstack.artifacts.protected import protected_blocks
from shortstack.artifacts.provenance import versions
from shortstack.artifacts.scores import CriterionScores
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.extras import need_packages
from shortstack.common.json_text import json_text, read_json
from shortstack.common.option_values import Listed
from shortstack.common.options import Options, stage
from shortstack.common.progress import Progress
from shortstack.common.shown import Shown
from shortstack.common.tables import Table
from shortstack.data.calibration import CalibrationOptions
from shortstack.errors import UsageError
from shortstack.families.open_model import open_model
from shortstack.runtime.atomic_output import check_writable_file, write_json
from shortstack.runtime.distributed import Process
from shortstack.runtime.workspace import workspace
from shortstack.scoring.agreement import Agreement, agreement_of
from shortstack.scoring.criteria import RequestedCriterion, parse_criteria
from shortstack.scoring.options import ScoreOptions
from shortstack.scoring.score import calibration_windows, score_windows


@dataclass(frozen=True)
class StabilityOptions(Options):
    """What is varied, and what is chosen.

    Attributes:
        remove: The number of blocks to remove.
        criterion: The criteria to compare, separated by commas, as in `shortstack score`.
        seeds: The number of seeds, beginning with `seed`.
        windows: The numbers of windows to compare with `samples`, such as `5,20`. By default it is half of `samples`.
        plus: Keep the first four and the last two blocks, as published. By default this is on for models of at least 10
            blocks.
    """

    remove: int = 6
    criterion: Listed = "ppl,taylor,bi"
    seeds: int = 3
    windows: Listed | None = None
    plus: bool | None = None

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise UsageError(f"--seeds {self.seeds}: expected at least 1")


_VARIED = ("criterion", "seed", "windows", "source")
_Order = tuple[str, str | None, list[int]]  # criterion, source, blocks
_CALIBRATION, _CHOICE, _OPTIONS = CalibrationOptions(), StabilityOptions(), ScoreOptions()


@dataclass(frozen=True)
class Ranked:
    """One ranking of the blocks.

    Attributes:
        criterion: The criterion.
        seed: The seed of the windows.
        windows: The number of windows; with named sources, of each source.
        order: The blocks by their numbers in the original model, first removed first.
        source: The named source whose windows alone made the ranking; None for all text.
    """

    criterion: str
    seed: int
    windows: int
    order: tuple[int, ...]
    source: str | None = None

    @property
    def name(self) -> str:
        """The name in tables and plots."""
        of = f", {self.source}" if self.source is not None else ""
        return f"{self.criterion}, seed {self.seed}, {self.windows} windows{of}"


@dataclass(frozen=True, repr=False)
class Stability(Shown):
    """Rankings of the blocks of one model, and how far they agree.

    Attributes:
        source: The model, as it was named in the call.
        remove: The number of blocks to remove.
        protected: The blocks that no ranking may remove, by their numbers in the original model.
        rankings: All rankings.
        varied: What was varied (`criterion`, `seed`, `windows` or `source`), two rankings that differ only in it, and
            their agreement.
    """

    source: str
    remove: int
    protected: tuple[int, ...]
    rankings: tuple[Ranked, ...]
    varied: tuple[tuple[str, Ranked, Ranked, Agreement], ...]

    def same(self, agreement: Agreement) -> int:
        """The number of blocks that both rankings would remove."""
        return len(agreement.chosen[self.remove][0])

    def table_rows(self) -> list[dict[str, Any]]:
        """One row for each pair of rankings that differ in one setting."""
        return [
            {
                "varied": what,
                "first": _differing(what, first),
                "second": _differing(what, second),
                "criterion": "" if what == "criterion" else first.criterion,
                "tau": agreement.tau,
                "same": self.same(agreement),
                "by_chance": agreement.by_chance[self.remove],
            }
            for what, first, second, agreement in self.varied
        ]

    def to_json(self) -> dict[str, Any]:
        """The JSON form (schema 1)."""
        return {
            "schema": 1,
            "source": self.source,
            "remove": self.remove,
            "protected": list(self.protected),
            "rankings": [{**vars(one), "order": list(one.order)} for one in self.rankings],
            "agreements": self.table_rows(),
        }

    def to_text(self) -> str:
        """What a person reads on the terminal."""
        rows = [
            [
                row["varied"], row["criterion"], f"{row['first']} and {row['second']}", f"{row['tau']:+.3f}",
                f"{row['same']} of {self.remove}", f"{row['by_chance']:.1f}",
            ]
            for row in self.table_rows()
        ]  # fmt: skip
        notes = ["'by chance': what two unrelated rankings would have in common on average"]
        title = f"{self.source}: agreement of the {self.remove} blocks to remove, and Kendall's tau over all blocks"
        header = ["varied", "criterion", "between", "tau", "same blocks", "by chance"]
        return Table(header, rows, title, notes).to_text()


@stage
def stability(
    model: str,
    *,
    out: Path | None = None,
    plot: Path | None = None,
    calibration: CalibrationOptions = _CALIBRATION,
    choice: StabilityOptions = _CHOICE,
    options: ScoreOptions = _OPTIONS,
) -> Stability:
    """Measure how stable the chosen blocks are when the criterion, the seed or the number of windows changes.

    One of them is varied at a time; the others stay as the options set them. If the text has named sources, these are
    compared, too.

    Args:
        model: The checkpoint: a directory, a hub id such as `org/name@revision`, or `embedded`.
        out: Write the figures to this file (JSON). If a run is killed, the same command resumes it.
        plot: Draw the share of blocks that each pair of rankings has in common, as a heat map, into this PNG file.
        calibration: the windows of the first seed.
        choice: what is varied, and how many blocks would go.
        options: how the runs go.

    Returns:
        The rankings, and how far they agree.

    Raises:
        ShortstackError: the checkpoint cannot be read, or there is too little text.
    """
    criteria, sizes = parse_criteria(choice.criterion), _sizes(choice, calibration)
    if plot is not None:
        check_writable_file(Path(plot))
        need_packages("--plot", "matplotlib", extra="report")
    if out is not None:
        check_writable_file(Path(out))
    process = Process.from_environment()
    progress = Progress(quiet=options.quiet or not process.leads).without_repeats()
    checkpoint = open_model(model, allow_links=options.allow_links, tokenizer=options.tokenizer, progress=progress)
    protected, note = protected_blocks(checkpoint.original_blocks, choice.plus)
    removable = checkpoint.depth - len(protected)
    if not 1 <= choice.remove <= removable:
        raise UsageError(f"--remove {choice.remove}: expected 1 to {removable} blocks")
    if note:
        progress.say(note)
    with workspace(out, leads=process.leads) as work:
        folder = work if process.world == 1 else None
        rankings = tuple(_rankings(checkpoint, criteria, sizes, calibration, choice, options, progress, folder))
        found = Stability(
            checkpoint.source, choice.remove, protected, rankings,
            tuple(_varied(rankings, calibration, set(protected), choice.remove)),
        )  # fmt: skip
        if out is not None and process.leads:
            write_json(Path(out), found.to_json())
    if plot is not None and process.leads:
        from shortstack.scoring.stability_plot import write_heat_map

        write_heat_map(found, Path(plot))
    return found


def _sizes(choice: StabilityOptions, calibration: CalibrationOptions) -> list[int]:
    """Numbers of windows, that of `samples` first."""
    text = choice.windows if choice.windows is not None else str(max(1, calibration.samples // 2))
    try:
        others = [int(part) for part in text.split(",")]
    except ValueError:
        others = [0]
    if min(others) < 1:
        raise UsageError(f"--windows {text}: expected numbers of windows", hint="--windows 5,20")
    return list(dict.fromkeys([calibration.samples, *others]))


def _rankings(
    checkpoint: Checkpoint,
    criteria: Sequence[RequestedCriterion],
    sizes: Sequence[int],
    calibration: CalibrationOptions,
    choice: StabilityOptions,
    options: ScoreOptions,
    progress: Progress,
    work: Path | None,
) -> Iterator[Ranked]:
    """By every criterion, of all seeds with the first number of windows, and of the first seed with the others."""
    for seed in range(calibration.seed, calibration.seed + choice.seeds):
        own = sizes if seed == calibration.seed else sizes[:1]
        text = calibration_windows(
            checkpoint, replace(calibration, seed=seed, samples=max(own)), options=options, progress=progress
        )
        for size in own:
            some = text.first(size)
            key = {
                "fingerprint": checkpoint.fingerprint,
                "windows": hashlib.sha256(json_text([some.windows, some.counted, some.sources]).encode()).hexdigest(),
                "criteria": [one.name for one in criteria],
                "options": [options.dtype, options.device, options.cpu_kernels],
                "versions": versions(),
            }
            file = None if work is None else work / f"seed-{seed}-windows-{size}.json"
            orders = _kept(file, key)
            if orders is None:
                scores = score_windows(checkpoint, some, criteria, options=options, progress=progress)
                orders = [order for one in criteria for order in _orders(scores.criterion(one.name))]
                if file is not None:
                    write_json(file, {"key": key, "orders": orders})
            usual = seed == calibration.seed and size == sizes[0]
            for name, source, order in orders:
                if source is None or usual:
                    yield Ranked(name, seed, size, tuple(order), source)


def _orders(found: CriterionScores) -> list[_Order]:
    """On all text, and on the windows of each named source."""
    of_sources = [(found.name, source, list(one.order)) for source, one in found.sources.items()]
    return [(found.name, None, list(found.order)), *of_sources]


def _kept(file: Path | None, key: dict[str, Any]) -> list[_Order] | None:
    """The orders that an earlier run left, where they are of the same windows and model."""
    try:
        found = read_json(file.read_bytes()) if file is not None else {}
    except (OSError, ValueError):
        return None
    orders: list[_Order] | None = found["orders"] if found.get("key") == key else None
    return orders


def _varied(
    rankings: Sequence[Ranked], calibration: CalibrationOptions, protected: set[int], remove: int
) -> Iterator[tuple[str, Ranked, Ranked, Agreement]]:
    """Every two rankings that differ in one thing, the others being the first seed and `samples`."""
    for what in _VARIED:
        for first, second in itertools.combinations(rankings, 2):
            differs = [name for name in _VARIED if getattr(first, name) != getattr(second, name)]
            usual = {"seed": calibration.seed, "windows": calibration.samples, "source": None}
            fixed = all(
                getattr(one, name) == value for one in (first, second) for name, value in usual.items() if name != what
            )
            if differs == [what] and fixed and (what != "source" or None not in (first.source, second.source)):
                names = (first.name, second.name)
                yield what, first, second, agreement_of(names, (first.order, second.order), protected, [remove])


def _differing(what: str, ranking: Ranked) -> str:
    return str(getattr(ranking, what))
