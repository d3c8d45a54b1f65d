"""A dry run: everything that a run would need is looked at, nothing is computed, and what it would leave is estimated."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shortstack.checkpoint.forecast import Estimate, Forecast
from shortstack.checkpoint.tokenizer_files import chosen_tokenizer
from shortstack.common.formatting import aligned_left, seconds, size
from shortstack.common.keywords import as_typed
from shortstack.common.progress import Progress
from shortstack.common.shown import Shown
from shortstack.errors import ShortstackError
from shortstack.families.open_model import open_model
from shortstack.recipes.cache_keys import model_identity, step_key
from shortstack.recipes.merge import MODEL, RUN
from shortstack.recipes.resolve import Recipe, Reference, Step
from shortstack.recipes.run_folder import RunFolder
from shortstack.recipes.schema import REFERENCES
from shortstack.recipes.step_times import StepTimes
from shortstack.registry import Kind
from shortstack.runtime.devices import pick_device

_FORETOLD: set[Kind] = {"checkpoint", "plan"}  # of these is known how many blocks they have
_WORDS: dict[Kind, str] = {"results": "figures"}  # what a user calls what a step makes


@dataclass(frozen=True)
class Foreseen:
    """The forecast of a step.

    Attributes:
        name: The name of the step.
        verb: The stage that the step runs, such as `score`.
        standing: `done` if an earlier run in the same folder has done the step.
        makes: What the step would write.
        nbytes: The disk space of its output in bytes.
        temporary_nbytes: The further disk space that the step needs while it runs, in bytes.
        seconds: The shortest time of the step in seconds; None if it is unknown.
    """

    name: str
    verb: str
    standing: str
    makes: str
    nbytes: int
    temporary_nbytes: int = 0
    seconds: float | None = None


@dataclass(frozen=True, repr=False)
class Rehearsal(Shown):
    """The forecast of a run (`--dry-run`).

    Attributes:
        out: The folder of the run.
        recipe: The recipe.
        model: The model that the run begins with.
        steps: The forecast of each step, in order.
        left_out: The optional steps that would be skipped, each with the reason.
        problems: The reasons why the run would fail, with the step.
        notes: What could not be checked.
        needed_bytes: The disk space that the run needs, in bytes.
        free_bytes: The free disk space in bytes.
        options: The options of each step.
        times: How the times were estimated, and which steps have no estimate.
    """

    out: Path
    recipe: str
    model: str
    steps: list[Foreseen]
    left_out: dict[str, str]
    problems: list[str]
    notes: list[str]
    needed_bytes: int
    free_bytes: int
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    times: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """1 if the run would fail, else 0."""
        return 1 if self.problems else 0

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        steps = [{**one.__dict__, "options": self.options[one.name]} for one in self.steps]
        return {"schema": 1, **self.__dict__, "out": str(self.out), "steps": steps, "would_run": not self.problems}

    def to_text(self) -> str:
        """The steps, and the reasons why the run would fail."""
        rows = [
            [one.name, one.verb, one.standing, one.makes, size(one.nbytes) if one.nbytes else "-",
             size(one.temporary_nbytes) if one.temporary_nbytes else "-",
             f"> {seconds(one.seconds)}" if one.seconds else "-"]
            for one in self.steps
        ]  # fmt: skip
        lines = [
            f"dry run of {self.recipe} on {self.model}: nothing was computed",
            aligned_left(["step", "stage", "", "would leave", "disk", "while it runs", "time"], rows),
            *(f"{name} is left out: {why}" for name, why in self.left_out.items()),
            f"{self.out}: about {size(self.needed_bytes)} needed, {size(self.free_bytes)} free",
            *self.times,
            *(f"note: {note}" for note in self.notes),
            *(f"would fail: {problem}" for problem in self.problems),
        ]
        return "\n".join(
            [*lines, "it would not run" if self.problems else "everything that can be looked at is in order"]
        )


def rehearsed(recipe: Recipe, out: Path) -> Rehearsal:
    """Look at everything that a run would need.

    Raises:
        ShortstackError: `out` holds something other than a run.
    """
    with as_typed():  # values are a recipe's or an estimate's, and problems are read as typed
        return _Rehearser(recipe, RunFolder.open(out)).rehearsal()


@dataclass
class _Rehearser:
    recipe: Recipe
    folder: RunFolder
    estimates: dict[str, Estimate] = field(default_factory=dict)  # of what steps make, by step
    made: dict[str, str] = field(default_factory=dict)  # identities of what is done already
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    times: StepTimes = field(default_factory=StepTimes)

    def rehearsal(self) -> Rehearsal:
        self.notes += self.recipe.replaced
        try:
            self.estimates["model"] = Estimate("", forecast=_opened(self.recipe.model))
        except ShortstackError as error:
            self._problem("model", error)
        try:
            self.folder.check_recipe(self.recipe)
        except ShortstackError as error:
            self._problem("recipe", error)
        steps = [self._foreseen(step) for step in self.recipe.steps]
        needed = sum(one.nbytes for one in steps) + max((one.temporary_nbytes for one in steps), default=0)
        folder = next(one for one in (self.folder.path, *self.folder.path.parents) if one.exists())
        free = shutil.disk_usage(folder).free
        if needed > free:
            self.problems.append(
                f"{folder}: {size(needed)} needed, {size(free)} free; make room, or choose another --out"
            )
        options = {
            step.name: {name: [str(part) for part in value] if isinstance(value, list) else
                        str(value) if isinstance(value, Reference) else value
                        for name, value in step.values.items()}
            for step in self.recipe.steps
        }  # fmt: skip
        return Rehearsal(
            self.folder.path, self.recipe.name, self.recipe.model, steps, self.recipe.left_out,
            list(dict.fromkeys(self.problems)), list(dict.fromkeys(self.notes)), needed, free, options, self.times.lines(),
        )  # fmt: skip

    def _problem(self, step: str, error: ShortstackError) -> None:
        self.problems.append(f"{step}: {error.message}" + (f" ({error.hint})" if error.hint else ""))

    def _foreseen(self, step: Step) -> Foreseen:
        command = step.command
        is_done = self._standing(step) == "done"
        if command.missing and not is_done:
            self.problems.append(f"{step.name}: needs {', '.join(command.missing)} (pip install {command.install})")
        values = self._looked_up(step)
        estimate, taken = Estimate(_WORDS.get(step.makes[0], step.makes[0])), None
        try:
            if not is_done:
                self._check(step, values)
            foresee = command.look_ahead("estimate")
            if foresee is not None and not (is_done and step.makes[0] == "results"):
                estimate = foresee(values)
            if not is_done:
                taken = self.times.seconds(step.name, estimate, values)
        except ShortstackError as error:
            if not is_done:
                self._problem(step.name, error)
        self.estimates[step.name] = estimate
        if is_done:
            return Foreseen(step.name, command.name, "done", "", 0)
        return Foreseen(step.name, command.name, "", estimate.makes, estimate.nbytes, estimate.temporary_nbytes, taken)

    def _check(self, step: Step, values: Mapping[str, Any]) -> None:
        """Look at what a step reads, and at options that mean something only to it.

        Raises:
            ShortstackError: it would fail on it.
        """
        if str(values.get("device", "")).startswith("cuda"):
            pick_device(values["device"])
        step.command.check_options(step.values)
        chosen_tokenizer(step.values.get("tokenizer"))
        check = step.command.look_ahead("check")
        if check is not None:
            self.notes += check(values)

    def _standing(self, step: Step) -> str:
        if not self.folder.record or any(name not in self.made for name in self._needs(step)):
            return "new"
        try:
            self.made.setdefault("model", model_identity(self.recipe.model))
            standing, changed = self.folder.standing(step, step_key(step, self.made))
        except ShortstackError:
            return "new"  # what is missing is a problem of its own
        if standing == "other":
            self.problems.append(
                f"{step.name}: was made with other settings in {self.folder.path}: {'; '.join(changed)} (--force)"
            )
        identity = self.folder.identity(step)
        if standing == "done" and identity is not None:
            self.made[step.name] = identity
        return standing

    def _needs(self, step: Step) -> set[str]:
        parts = [part for value in step.values.values() for part in (value if isinstance(value, list) else [value])]
        named = {part.step for part in parts if isinstance(part, Reference)} - {MODEL}
        if RUN in named:
            order = [one.name for one in self.recipe.steps]
            named = (named - {RUN}) | set(order[: order.index(step.name)])
        return named

    def _looked_up(self, step: Step) -> dict[str, Any]:
        """A step's values with what they name: a model as the forecast of one (None where there is none), scores and
        the like that an earlier step will make as their estimate.
        """
        return {
            name: [self._found(step, name, part) for part in value] if isinstance(value, list) else
            self._found(step, name, value)
            for name, value in step.values.items()
        }  # fmt: skip

    def _found(self, step: Step, name: str, value: Any) -> Any:
        kinds = REFERENCES.get(name, ())
        if isinstance(value, Reference):
            estimate = self.estimates.get(value.step)
            return estimate if estimate is None or not _FORETOLD.intersection(kinds) else estimate.forecast
        if "checkpoint" not in kinds or not isinstance(value, str):
            return value
        try:
            return _opened(value)
        except ShortstackError as error:
            self._problem(step.name, error)
            return None


def _opened(model: str) -> Forecast:
    return Forecast.of(open_model(model, headers_only=True, progress=Progress(quiet=True)))
