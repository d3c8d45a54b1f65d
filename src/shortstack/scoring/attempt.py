"""One scoring run with given options, and again with less at a time where memory runs out."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.artifacts.provenance import versions
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.json_text import json_text
from shortstack.common.progress import Progress
from shortstack.engine.select import EngineOptions, with_less_memory
from shortstack.errors import ShortstackError
from shortstack.runtime.distributed import ALONE, Process
from shortstack.runtime.memory import is_out_of_memory
from shortstack.scoring.criteria import Criterion
from shortstack.scoring.early_stopping import Rounds, Stability
from shortstack.scoring.runner import ScoringRun

if TYPE_CHECKING:
    from shortstack.engine.journal import SavedState
    from shortstack.engine.select import Engine


def attempted(attempt: Attempt, options: EngineOptions | None) -> tuple[ScoringRun, dict[str, Any]]:
    """The run and the settings that it ran with; with less at a time where memory runs out.

    Raises:
        ShortstackError: it does not fit with the least at a time either.
    """
    checkpoint, windows, place = attempt.checkpoint, attempt.windows, options.device if options is not None else None
    while options is not None:
        try:
            return attempt.run(options)
        except (RuntimeError, MemoryError) as error:
            if not (is_out_of_memory(error) or isinstance(error, MemoryError)):
                raise
            if attempt.process.world > 1:
                raise ShortstackError(
                    f"{checkpoint.source}: out of memory on {place}, in one of {attempt.process.world} processes",
                    hint="--memory streamed, a smaller --seq-len, or fewer processes",
                ) from None
            options = with_less_memory(options, attempt.engine, len(windows[0]) if windows else 1)
            if options is not None:
                attempt.progress.say(f"out of memory on {place}: trying again with less at a time")
    raise ShortstackError(
        f"{checkpoint.source}: out of memory on {place}, even with one window and one block at a time",
        hint="a smaller --seq-len, --dtype bfloat16, or --device cpu",
    )


@dataclass
class Attempt:
    """One scoring run with given options; `engine` is what it ran with."""

    checkpoint: Checkpoint
    windows: Sequence[Sequence[int]] | None
    criteria: list[Criterion]
    progress: Progress
    work_folder: Path | None
    save_every: float
    left: SavedState | None
    linear: str | None
    process: Process = ALONE
    rounds: Rounds | None = None
    stability: Stability | None = None
    engine: Engine | None = None

    def run(self, options: EngineOptions) -> tuple[ScoringRun, dict[str, Any]]:
        """The sweeps, and the settings that they ran with."""
        from shortstack.engine.cpu import fast_linear, largest_matrix
        from shortstack.engine.journal import Journal
        from shortstack.engine.select import choose_engine

        self.engine = None
        windows = self.windows
        if self.rounds is not None and windows is not None:
            windows = windows[: self.rounds.size]
        if windows is not None:
            windows = windows[self.process.part(len(windows))]
        self.engine = engine = choose_engine(self.checkpoint, windows, options)
        settings: dict[str, Any] = {
            "dtype": str(options.dtype).removeprefix("torch."),
            "device": str(options.device),
            "memory": engine.memory,
            **({"whole_model": engine.reason} if engine.reason else {}),
            **({"processes": self.process.world} if self.process.world > 1 else {}),
            "versions": versions(),
        }
        shape = largest_matrix(self.checkpoint)
        with (
            contextlib.closing(engine),
            fast_linear(options.dtype, options.device, shape, chosen=self.linear) as linear,
        ):
            settings["linear"] = linear
            shared = windows if self.rounds is None else self.windows
            key = _run_key(self.checkpoint, shared, self.criteria, settings, engine)
            if self.left is not None:
                _say_what_becomes_of(self.left.record["key"], key, self.work_folder, self.progress)
            journal = Journal(self.work_folder, key, every_seconds=self.save_every)
            run = ScoringRun(engine, self.criteria, self.progress, journal, self.process)
            if self.rounds is not None and self.windows is not None and self.stability is not None:
                self.stability.begin()
                run.sweep_rounds(self.windows, self.rounds.size, self.stability)
            else:
                run.sweep(self.windows)
        return run, settings


def _run_key(
    checkpoint: Checkpoint,
    windows: Sequence[Sequence[int]] | None,
    criteria: Sequence[Criterion],
    settings: dict[str, Any],
    engine: Engine,
) -> dict[str, Any]:
    """All that makes the scores to the last bit: a saved state with another key is not used."""
    import torch

    return {
        "fingerprint": checkpoint.fingerprint,
        "windows": hashlib.sha256(json_text(windows).encode()).hexdigest(),
        "criteria": [asked.name for asked in criteria],
        **{name: value for name, value in settings.items() if name != "memory"},
        "group": engine.group,
        "tokens": engine.tokens,
        "blocks": list(engine.candidates),
        "threads": torch.get_num_threads(),
    }


def _say_what_becomes_of(left: dict[str, Any], key: dict[str, Any], folder: Path | None, progress: Progress) -> None:
    differs = [name for name in key if left.get(name) != key[name]]
    if differs:
        progress.say(f"the saved state in {folder} is another run's (other {', '.join(differs)}) and is not used")
    else:
        progress.say(f"going on from the saved state in {folder}")
