"""Run a recipe: one step after the other, each in its folder; a step whose result is there already is skipped."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from shortstack.common.clock import command_seconds
from shortstack.common.formatting import aligned_left, plain, seconds
from shortstack.common.options import Options, stage
from shortstack.common.progress import Progress
from shortstack.common.shown import Shown
from shortstack.errors import ShortstackError, UsageError
from shortstack.recipes.cache_keys import model_identity, step_key
from shortstack.recipes.coordination import Team
from shortstack.recipes.dry_run import Rehearsal, rehearsed
from shortstack.recipes.merge import MODEL, RUN
from shortstack.recipes.resolve import Recipe, Reference, Step, resolve
from shortstack.recipes.run_folder import RunFolder, command_line
from shortstack.recipes.schema import OUTPUTS, REFERENCES, unknown
from shortstack.runtime.atomic_output import absolute, locked, write_json
from shortstack.runtime.devices import DType

_SHOWN = 2  # steps whose findings are a run's result: figures, and the report of them


@dataclass(frozen=True)
class StepResult:
    """The outcome of one step.

    Attributes:
        name: The name of the step.
        verb: The stage that the step ran, such as `score`.
        state: `done` in this run, or `skipped` because an earlier run has done it.
        seconds: The wall-clock time of the step in seconds, in the run that did it.
        output: The output of the step: a file or a folder.
        text: The outcome as text.
        result: The record that the stage returned; None if the step was skipped.
    """

    name: str
    verb: str
    state: Literal["done", "skipped"]
    seconds: float
    output: Path
    text: str
    result: Any = None


@dataclass(frozen=True, repr=False)
class RunResult(Shown):
    """The outcome of a completed run of a recipe.

    Attributes:
        out: The folder of the run.
        recipe: The recipe.
        steps: The outcome of each step, in order.
        left_out: The optional steps that were skipped, each with the reason.
        seconds: The wall-clock time of this run in seconds.
    """

    out: Path
    recipe: str
    steps: list[StepResult]
    left_out: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        steps = [
            {
                "name": step.name,
                "stage": step.verb,
                "state": step.state,
                "seconds": step.seconds,
                "output": str(step.output),
            }
            for step in self.steps
        ]
        return {"schema": 1, "out": str(self.out), "recipe": self.recipe, "steps": steps, "left_out": self.left_out,
                "seconds": self.seconds}  # fmt: skip

    def to_text(self) -> str:
        """The steps, and the results of the last two."""
        rows = [
            [step.name, step.verb, step.state, seconds(step.seconds), _within(step.output, self.out)]
            for step in self.steps
        ]
        lines = [aligned_left(["step", "stage", "", "took", "left behind"], rows)]
        lines += [f"{name} was left out: {why}" for name, why in self.left_out.items()]
        for step in self.steps[-_SHOWN:]:
            lines += ["", step.text] if step.text else []
        return "\n".join([*lines, "", f"{self.recipe}: everything is in {self.out} ({seconds(self.seconds)})"])


@dataclass(frozen=True)
class RunOptions(Options):
    """How a recipe is run.

    Attributes:
        dry_run: Run nothing. Check models, data, packages and disk space, and show the steps with their sizes.
        dtype: The data type that every step computes in, unless `set_` gives a step another.
        device: The device on which every step computes, unless `set_` gives a step another.
        force: Run steps again that an earlier run in this folder has done with other settings.
        quiet: Show no progress on stderr.
    """

    dry_run: bool = False
    dtype: DType | None = None
    device: str | None = None
    force: bool = False
    quiet: bool = False


_OPTIONS = RunOptions()


@stage
def run(
    recipe: str,
    *,
    model: str | None = None,
    out: Path | None = None,
    set_: Sequence[str] = (),
    from_: str | None = None,
    options: RunOptions = _OPTIONS,
) -> RunResult | Rehearsal | None:
    """Run a recipe: a pipeline of stages, by its name in the package or from a YAML file of your own.

    A step is skipped if an earlier run in the same folder has done it with the same model, data, options and versions.
    If a run is killed, the same command resumes it.

    Args:
        recipe: The recipe: a name (`shortstack recipes` lists them), or a file.
        model: Begin with this checkpoint instead of the recipe's: a directory, a hub id, or `embedded`.
        out: The folder of the run, in which each step has a folder. By default it has the name of the recipe.
        set_: Change an option of a step, as `step.key=value`. It can be given several times. `step=null` removes a
            step.
        from_: Run this step and all later steps again, even if they are done.
        options: how the run works.

    Returns:
        The outputs of every step; with `dry_run`, the forecast. None in processes other than the first.

    Raises:
        ShortstackError: the recipe is wrong, or a step failed; names the step.
    """
    everywhere = {
        name: value for name, value in (("dtype", options.dtype), ("device", options.device)) if value is not None
    }
    made = resolve(recipe, model=model, settings=set_, everywhere=everywhere)
    if from_ is not None and from_ not in [step.name for step in made.steps]:
        raise unknown(f"--from {from_}", from_, [step.name for step in made.steps], "step")
    folder = absolute(out if out is not None else f"shortstack-{Path(made.name).stem}")
    if options.dry_run:
        return rehearsed(made, folder)
    for line in made.replaced:
        Progress(quiet=options.quiet).say(line)
    for step in made.steps:
        step.command.need_packages()
        with _naming(step.name):
            step.command.check_options(step.values)
    team = Team.from_environment()
    if not team.leads:
        _follow(made, folder, team)
        return None
    with locked(folder):
        runner = _Runner(made, RunFolder.open(folder), Progress(quiet=options.quiet), team, options.force, from_)
        steps = runner.run()
    shown = Path(out) if out is not None else Path(folder.name)
    return RunResult(shown, made.name, steps, made.left_out, command_seconds())


@dataclass
class _Runner:
    """One run, in the process that leads."""

    recipe: Recipe
    folder: RunFolder
    progress: Progress
    team: Team
    force: bool
    from_: str | None
    made: dict[str, str] = field(default_factory=dict)  # step, or `model` -> identity of what is there

    def run(self) -> list[StepResult]:
        """All steps.

        Raises:
            ShortstackError: one failed; those before it stay done.
        """
        if not self.force:
            self.folder.check_recipe(self.recipe)
        found = []
        again = False
        self.made["model"] = model_identity(self.recipe.model)
        for number, step in enumerate(self.recipe.steps, start=1):
            again = again or step.name == self.from_
            with _naming(step.name):
                found.append(self._step(number, step, again))
            self.made[step.name] = self.folder.noted(step)["identity"]
        self.team.tell("end")
        self.team.close()
        return found

    def _step(self, number: int, step: Step, again: bool) -> StepResult:
        key = step_key(step, self.made)
        standing, changed = self.folder.standing(step, key)
        says = f"{number}/{len(self.recipe.steps)} {step.name}"
        verb, output = step.command.name, self.folder.output(step)
        if standing == "done" and not again:
            self.progress.say(f"{says}: done by an earlier run (--from {step.name} runs it again)")
            self.team.tell("skip")
            noted = self.folder.noted(step)
            return StepResult(step.name, verb, "skipped", noted["seconds"], output, noted["text"])
        if standing == "other" and not (again or self.force):
            raise ShortstackError(
                f"was made with other settings in {self.folder.path}: {'; '.join(changed)}",
                hint=f"choose another --out, or run it again with --from {step.name} or --force",
            )
        self.progress.say(f"{says}: {step.command.summary}")
        self.folder.begin(self.recipe, step, key)
        self.folder.note(step, command=command_line(self.recipe, step))
        self.team.tell("together" if step.command.parallel else "alone")
        if step.command.parallel:
            self.team.gather()
        started = time.perf_counter()
        with _logged(self.folder.log_file(step)) as log:
            anew = again or standing == "other"
            quiet, force = self.progress.quiet, self.force
            result = step.command.call(call_values(self.recipe, step, self.folder, quiet, anew=anew, force=force))
            if not step.command.makes:
                write_json(output, result.to_json())
            text = "\n".join(plain(line) for line in result.to_text().split("\n"))
            log.write(text + "\n")
        has_failed = bool(getattr(result, "exit_code", 0))
        if has_failed or step not in self.recipe.steps[-_SHOWN:]:  # what the last ones found is shown at the end
            self.progress.say(text + "\n")
        if has_failed:
            raise ShortstackError(
                f"it found faults, which are in {self.folder.log_file(step)}",
                hint=f"correct them, or use --set {step.name}=null",
            )
        took = time.perf_counter() - started
        self.folder.note(step, state="done", seconds=took, identity=self.folder.identity(step), text=text)
        return StepResult(step.name, verb, "done", took, output, text, result)


@contextlib.contextmanager
def _naming(step: str) -> Iterator[None]:
    """Within, an error says which step it is of."""
    try:
        yield
    except ShortstackError as error:
        kind = UsageError if isinstance(error, UsageError) else ShortstackError
        raise kind(f"step {step}: {error.message}", hint=error.hint) from error


def _within(output: Path, out: Path) -> str:
    folder = absolute(out)
    return str(out / output.relative_to(folder)) if output.is_relative_to(folder) else str(output)


def call_values(
    recipe: Recipe, step: Step, folder: RunFolder, quiet: bool, *, anew: bool, force: bool = False
) -> dict[str, Any]:
    """What the stage function is called with."""
    options = step.command.options

    def passed(name: str, part: Any) -> Any:
        if isinstance(part, Reference):
            part = _path_of(recipe, folder, part, name)
        if name in OUTPUTS:
            part = folder.path / step.name / part
        return Path(part) if options[name].is_path and isinstance(part, str) else part

    values = {
        name: [passed(name, part) for part in value] if isinstance(value, list) else passed(name, value)
        for name, value in step.values.items()
    }
    output = folder.output(step)
    makes_it = bool(step.command.makes)  # a step that changes what another has made forces nothing by itself
    steering = {"out": output, "quiet": quiet, "force": force or (makes_it and output.exists()), "restart": anew}
    return {**values, **{name: value for name, value in steering.items() if name in options}}


def _path_of(recipe: Recipe, folder: RunFolder, reference: Reference, option: str) -> str:
    """Where what an option refers to lies."""
    if reference.step == MODEL:
        return recipe.model
    if reference.step == RUN:
        return str(folder.path)
    made_by = next(step for step in recipe.steps if step.name == reference.step)
    places = made_by.command.makes_with(made_by.values)
    inside = next((places[kind] for kind in REFERENCES[option] if kind in places), "")
    return str(folder.path / made_by.name / inside)


def _follow(recipe: Recipe, folder: Path, team: Team) -> None:
    """In the other processes: take part in the steps that several processes share, as the first one says."""
    for step in recipe.steps:
        if team.hear() == "together":
            team.gather()
            step.command.call(call_values(recipe, step, RunFolder(folder), quiet=True, anew=False))
    team.hear()
    team.close()


@contextlib.contextmanager
def _logged(path: Path) -> Iterator[IO[str]]:
    """Everything that is said on stderr goes into a file, too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as log:
        log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        both = _Both(sys.stderr, log)
        with contextlib.redirect_stderr(both):
            try:
                yield log
            except ShortstackError as error:
                log.write(f"error: {error}\n")
                raise


class _Both:
    """A stream that writes to two; bars, which only a terminal shows, to the first alone."""

    def __init__(self, shown: IO[str], log: IO[str]) -> None:
        self._shown, self._log = shown, log

    def write(self, text: str) -> int:
        """Write to both."""
        if "\r" not in text:
            self._log.write(text)
        return self._shown.write(text)

    def flush(self) -> None:
        """Flush both."""
        self._shown.flush()
        self._log.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._shown, name)
