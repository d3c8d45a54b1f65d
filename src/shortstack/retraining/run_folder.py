"""The work folder of a run (which run it belongs to, its checkpoints, which of them are complete), and its progress.

`.NAME.shortstack-work/` lies beside the output. A checkpoint counts once `complete.json` stands in it, written last,
after everything else was flushed, with the names and sizes of its files. What was being written when a process died
has no such file and is never used.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shortstack.common.formatting import seconds
from shortstack.common.json_text import json_text, read_json
from shortstack.common.progress import Progress
from shortstack.errors import ShortstackError, first_line
from shortstack.runtime.atomic_output import sync_tree, write_file, write_json
from shortstack.runtime.distributed import Process
from shortstack.runtime.workspace import append_log, load_state, read_log, save_state

COMPLETE = "complete.json"
STREAM = "stream.json"
_RUN = "run.json"
_METRICS = "metrics.jsonl"
_WARM_UP = 2  # steps that say nothing about speed
_KEPT = 2  # the last checkpoints that stay, besides the best
_NAME = re.compile(r"checkpoint-(\d+)")
# Without these a run would resume with fresh state, and nobody would be told.
_STATE_FILES = ("optimizer", "scheduler", "rng_state", "trainer_state")


@dataclass(frozen=True)
class Session:
    """A run's work folder.

    Attributes:
        folder: where it is.
        key: all that makes the run: a checkpoint of a run with another key is refused.
        process: this process.
    """

    folder: Path
    key: dict[str, Any]
    process: Process

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints lie."""
        return self.folder / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The file of metrics, a line per logging step and evaluation."""
        return self.folder / _METRICS

    def begin(
        self, *, restart: bool, force: bool, weights_only: bool, progress: Progress
    ) -> tuple[Path | None, list[str]]:
        """Make the folder, or find the checkpoint to resume from. The first process does this before the others.

        Returns:
            (the checkpoint, what is different in the run that it is of, where `force` resumes in spite of it).

        Raises:
            ShortstackError: what is there belongs to another run, or its newest complete checkpoint has lost files.
        """
        if not self.process.leads:
            return self._newest(weights_only), []
        if restart:
            shutil.rmtree(self.folder, ignore_errors=True)
        record, differs = load_state(self.folder / _RUN, self.key)
        if not self.complete_steps():
            differs = []  # there is nothing to resume
        if differs and not force:
            raise ShortstackError(
                f"{self.folder}: holds a run that was begun with other settings: {'; '.join(differs)}",
                hint="use the former settings to resume it, --restart to begin at step 0, or --force to resume with these",
            )
        found = self._newest(weights_only)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        for folder in self.checkpoints.iterdir():
            if not (folder / COMPLETE).is_file():  # a killed process was writing it
                shutil.rmtree(folder, ignore_errors=True)
        save_state(self.folder / _RUN, self.key, forced=[*record.get("forced", []), *differs])
        step = step_of(found) if found is not None else 0
        kept = [line for line in self.read_metrics() if line.get("step", 0) <= step]  # the rest is logged again
        write_file(self.metrics, "".join(json_text(line) + "\n" for line in kept).encode())
        if found is not None:
            progress.say(f"resuming from step {step} ({found})")
        return found, differs

    @contextlib.contextmanager
    def saving(self, step: int) -> Iterator[Path]:
        """Within, the checkpoint after so many steps is written to the folder that this gives.

        Raises:
            ShortstackError: it could not be; what was written of it is removed.
        """
        folder = self.at(step)
        try:
            yield folder
        except (OSError, RuntimeError, ShortstackError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            steps = self.complete_steps()
            kept = f"the one of step {steps[-1]} is kept" if steps else "there is none before it"
            raise ShortstackError(
                f"{folder}: the checkpoint could not be saved ({first_line(error)}); {kept}",
                hint="free some disk space, then run the same command again: it resumes from there",
            ) from error

    def complete(self, checkpoint: Path) -> None:
        """Mark a checkpoint as complete, after all of its files are on the disk."""
        sync_tree(checkpoint)
        files = {
            str(path.relative_to(checkpoint)): path.stat().st_size
            for path in sorted(checkpoint.rglob("*"))
            if path.is_file()
        }
        write_json(checkpoint / COMPLETE, {"files": files})

    def rotate(self, best: int | None) -> None:
        """Remove all complete checkpoints but the last two and the best."""
        steps = self.complete_steps()
        for step in steps[:-_KEPT]:
            if step != best:
                folder = self.at(step)
                (folder / COMPLETE).unlink()  # first, so that a half-removed one does not count
                shutil.rmtree(folder, ignore_errors=True)

    def complete_steps(self) -> list[int]:
        """Steps of the complete checkpoints, in order."""
        found = [step_of(path.parent) for path in self.checkpoints.glob(f"checkpoint-*/{COMPLETE}")]
        return sorted(found)

    def at(self, step: int) -> Path:
        """The folder of the checkpoint after `step` steps."""
        return self.checkpoints / f"checkpoint-{step}"

    def log(self, record: dict[str, Any]) -> None:
        """Append a line to the metrics."""
        if self.process.leads:
            append_log(self.metrics, [record])

    def read_metrics(self) -> list[dict[str, Any]]:
        """All lines of the metrics; one that a killed process left unfinished is not among them."""
        return read_log(self.metrics)

    def _newest(self, weights_only: bool) -> Path | None:
        steps = self.complete_steps()
        if not steps:
            return None
        newest = self.at(steps[-1])
        files = read_json((newest / COMPLETE).read_bytes())["files"]
        lost = [
            name for name, size in files.items() if not (path := newest / name).is_file() or path.stat().st_size != size
        ]
        is_state = [Path(name).parts[0].split(".")[0].startswith(_STATE_FILES) for name in lost]
        if lost and not (weights_only and all(is_state)):
            can_go_on = all(is_state)
            raise ShortstackError(
                f"{newest}: {', '.join(lost)} is missing, or its size has changed",
                hint="--weights-only-resume resumes with a fresh optimizer, schedule and random state; or --restart"
                if can_go_on
                else "restore the file, or use --restart",
            )
        return newest


def step_of(checkpoint: Path) -> int:
    """The number of steps after which a checkpoint was saved."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else 0


@dataclass
class Monitor:
    """Speed and progress of a run.

    Attributes:
        total: steps in all.
        flops_per_token: operations that training on one token takes.
        peak_flops: what the device reaches in matrix products, per second; 0 where it was not measured.
    """

    progress: Progress
    total: int
    flops_per_token: float = 0.0
    peak_flops: float = 0.0
    _times: list[tuple[float, int, int]] = field(default_factory=list)

    def step_done(self, step: int, tokens: int) -> None:
        """Note that a step ended, having trained on `tokens` tokens over all processes."""
        before = self._times[-1][2] if self._times else 0
        self._times.append((time.perf_counter(), step, before + tokens))
        if len(self._times) > 200:
            del self._times[100]  # the first ones and the last ones say enough

    def pause(self, started: float) -> None:
        """Take the time of an evaluation or a save since `started` out of the speed."""
        lost = time.perf_counter() - started
        self._times = [(at + lost, step, tokens) for at, step, tokens in self._times]

    def figures(self) -> dict[str, float]:
        """tokens_per_second, share_of_peak, seconds_left, as far as they are known."""
        first = min(_WARM_UP, len(self._times) - 1)
        if first < 0 or len(self._times) - 1 <= first:
            return {}
        (began, first_step, first_tokens), (now, step, tokens) = self._times[first], self._times[-1]
        elapsed = max(now - began, 1e-9)
        speed = (tokens - first_tokens) / elapsed
        found = {
            "tokens_per_second": speed,
            "seconds_left": (self.total - step) * elapsed / max(1, step - first_step),
        }
        if self.peak_flops and self.flops_per_token:
            found["share_of_peak"] = speed * self.flops_per_token / self.peak_flops
        return found

    def say(self, record: dict[str, Any]) -> None:
        """One line about a record of the metrics."""
        parts = [f"step {record['step']}/{self.total}"]
        if record.get("block") is not None:
            parts.append(f"block {record['block']}")
        for name, form in (("loss", "loss {:.4f}"), ("learning_rate", "lr {:.2e}"), ("kl", "kl {:.4f}"),
                           ("nll", "nll {:.4f}"), ("hidden", "hidden {:.4f}"), ("validation", "validation {:.4f}"),
                           ("validation_before", "({:.4f} before)"),
                           ("tokens_per_second", "{:.0f} tokens/s"), ("share_of_peak", "{:.0%} of peak")):  # fmt: skip
            if record.get(name) is not None:
                parts.append(form.format(record[name]))
        parts += [
            f"{name.removeprefix('ppl:')} ppl {value:.2f}" for name, value in record.items() if name[:4] == "ppl:"
        ]
        if record.get("seconds_left") is not None:
            parts.append(f"{seconds(record['seconds_left'])} left")
        self.progress.say("  ".join(parts))
