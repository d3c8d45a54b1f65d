"""What a recipe comes to: every value checked, references and paths found."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shortstack.common.options import Option
from shortstack.common.source_names import before_and_place
from shortstack.errors import ShortstackError, UsageError
from shortstack.recipes.merge import (
    BASES,
    MODEL,
    RUN,
    SHIPPED,
    Draft,
    Said,
    find_recipe,
    lay_setting,
    read_draft,
)
from shortstack.recipes.schema import (
    IN_PLACE,
    OUTPUTS,
    REFERENCES,
    SOURCES,
    STEP,
    TOP,
    checked,
    stages,
    step_options,
    unknown,
)
from shortstack.registry import Command, Kind


@dataclass(frozen=True)
class Reference:
    """What another step leaves behind; `model` is the checkpoint that the recipe begins with, `run` all that steps left."""

    step: str

    def __str__(self) -> str:
        return f"${self.step}"


@dataclass(frozen=True)
class Step:
    """One step of a recipe, checked.

    Attributes:
        name: its own; also its folder's.
        command: what it runs.
        values: by parameter name; references are `Reference`, paths are absolute or relative to where the user is.
        optional: it may be left out where packages are missing.
    """

    name: str
    command: Command
    values: dict[str, Any]
    optional: bool = False

    @property
    def makes(self) -> tuple[Kind, ...]:
        """What later steps can use of it."""
        return tuple(self.command.makes_with(self.values)) or ("text",)


@dataclass(frozen=True)
class Recipe:
    """A recipe with everything that it extends and every change made on the command line.

    Attributes:
        name: as requested.
        file: where it is, by whatever name it was requested.
        about: what it does.
        model: the checkpoint that it begins with; empty where it is for any.
        steps: in order.
        left_out: optional steps whose packages are not installed -> what to install.
        replaced: a line for each step of which options were replaced by those that were set by hand.
    """

    name: str
    file: Path
    about: str
    model: str
    steps: tuple[Step, ...]
    left_out: dict[str, str] = field(default_factory=dict)
    replaced: tuple[str, ...] = ()

    def to_yaml(self) -> str:
        """The recipe as YAML that says everything itself; files are named in full, so that it can lie anywhere."""
        import yaml

        steps: dict[str, dict[str, Any]] = {}
        for step in self.steps:
            said: dict[str, Any] = {"stage": step.command.name, **({"optional": True} if step.optional else {})}
            for name, value in step.values.items():
                said[name] = _spoken(step_options(step.command)[name], value)
            steps[step.name] = said
        model = {"model": _in_full(self.model)} if self.model else {}
        record = {"about": self.about, **model, "steps": steps}
        return str(yaml.safe_dump(record, sort_keys=False, allow_unicode=True, width=120))


def _spoken(parameter: Option, value: Any) -> Any:
    if isinstance(value, list):
        return [_spoken(parameter, part) for part in value]
    if isinstance(value, Reference):
        return str(value)
    if isinstance(value, str) and parameter.name not in OUTPUTS and (parameter.is_path or parameter.name in SOURCES):
        return ",".join(map(_in_full, value.split(",")))
    return value


def _in_full(source: str) -> str:
    before, place = ("", source) if Path(source).expanduser().exists() else before_and_place(source)
    path = Path(place).expanduser()
    return f"{before}{path.absolute()}" if path.exists() else source


def resolve(
    name: str,
    *,
    model: str | None = None,
    settings: Sequence[str] = (),
    everywhere: Mapping[str, Any] | None = None,
    to_run: bool = True,
) -> Recipe:
    """Read a recipe and check all of it.

    Args:
        name: of one in the package, or a file.
        model: the checkpoint to begin with, instead of the recipe's.
        settings: changes, as `step.key=value` (the value is YAML; null forgets it), or `step=null`.
        everywhere: options for every step that has them, such as dtype and device.
        to_run: a recipe for any model needs one to begin with; without, it is read to be shown.

    Raises:
        ShortstackError: something in it cannot be; names file, line and the nearest thing that can.
    """
    path = find_recipe(name)
    draft = read_draft(path)
    set_by_hand = {lay_setting(draft, setting) for setting in settings}
    replaced = _replaced(draft, set_by_hand)
    if model is not None:
        draft.model = Said(model, "--model", None)
    if draft.model is None and to_run:
        raise UsageError(f"{name}: has no model to begin with", hint="--model MODEL")
    if not draft.steps:
        raise ShortstackError(f"{path}: has no steps", hint=TOP["steps"])
    begins_with = _source(draft.model, draft.model.value) if draft.model else ""
    steps: list[Step] = []
    left_out: dict[str, str] = {}
    for step_name, said in draft.steps.items():
        command, optional = _command_of(step_name, said)
        if optional and command.missing:
            left_out[step_name] = f"it needs pip install {command.install}"
            continue
        runs = not command.runs_with or any(
            option in said and said[option].value is not None for option in command.runs_with
        )
        for key, value in (everywhere or {}).items() if runs else ():
            if key in step_options(command) and (step_name, key) not in set_by_hand:
                said[key] = Said(value, f"--{key}", None)
        steps.append(Step(step_name, command, _values(step_name, command, said, steps, left_out), optional))
    shown = path.stem if path.parent == SHIPPED else name
    return Recipe(shown, path.resolve(), draft.about, begins_with, tuple(steps), left_out, replaced)


def _replaced(draft: Draft, set_by_hand: set[tuple[str, str]]) -> tuple[str, ...]:
    """Take away what an option that was set by hand takes the place of, such as scores and counts where blocks are given."""
    lines = []
    for step, key in sorted(set_by_hand):
        said = draft.steps.get(step, {})
        if key not in said or said[key].value is None:
            continue
        option = _command_of(step, said)[0].options.get(key)
        gone = [
            name for name in (option.replaces if option else ()) if name in said and (step, name) not in set_by_hand
        ]
        for name in gone:
            del said[name]
        if gone:
            lines.append(f"{step}: {key} replaces {', '.join(gone)}")
    return tuple(lines)


def _command_of(name: str, said: Mapping[str, Said]) -> tuple[Command, bool]:
    """(what a step runs, whether it may be left out)."""
    asked = said.get("stage")
    verb = asked.value if asked is not None else name
    place = asked.place if asked is not None else next((one.place for one in said.values()), name)
    if not isinstance(verb, str) or verb not in stages():
        raise unknown(f"{place}: step {name}", str(verb), stages(), "stage")
    optional = said["optional"].value if "optional" in said else False
    if not isinstance(optional, bool):
        raise ShortstackError(f"{said['optional'].place}: optional is {optional!r:.60}, expected true or false")
    return stages()[verb], optional


def _values(
    name: str, command: Command, said: Mapping[str, Said], before: Sequence[Step], left_out: Mapping[str, str]
) -> dict[str, Any]:
    """The values of a step's parameters, checked, with references and paths found."""
    given = {key: one for key, one in said.items() if key not in STEP}
    for key in given:
        if key in command.options and key not in step_options(command):
            raise ShortstackError(
                f"{given[key].place}: {key} is not allowed in a recipe: only the user can set it", hint="leave it out"
            )
    values = checked(command.name, {key: one.value for key, one in given.items()}, lambda key: given[key].place)
    found = {}
    for key, value in values.items():
        parameter, one = step_options(command)[key], given[key]
        if isinstance(value, list):
            parts = [_value(name, parameter, one, part, before, left_out) for part in value]
            found[key] = [part for part in parts if part is not None]
        else:
            found[key] = _value(name, parameter, one, value, before, left_out)
            if found[key] is None:
                raise ShortstackError(
                    f"{one.place}: {value} was skipped: {left_out[value[1:]]}", hint=f"make {name} optional, too"
                )
    return _completed(name, command, found, before, next((one.place for one in said.values()), ""))


def _completed(
    name: str, command: Command, found: dict[str, Any], before: Sequence[Step], place: str
) -> dict[str, Any]:
    """With the checkpoints that a step is about where it does not say so."""
    options = step_options(command)
    made = [Reference(step.name) for step in before if "checkpoint" in step.makes]
    if "model" in options and "model" not in found:
        found = {"model": made[-1] if made else Reference(MODEL), **found}
    if "base" in options and "base" not in found and isinstance(found.get("adapter"), Reference):
        trained = next(step for step in before if step.name == found["adapter"].step)
        found = {**found, "base": trained.values["model"]}
    if "models" in options and not found.get("models"):
        found = {"models": [Reference(MODEL), *made], **found}
    for key in IN_PLACE & options.keys() - found.keys():
        found = {key: made[-1], **found} if made else found
    if "sources" in options and not found.get("sources"):
        found = {"sources": [Reference(RUN)], **found}
    for key, parameter in options.items():
        must_be_said = parameter.default is inspect.Parameter.empty
        if must_be_said and not found.get(key):
            raise ShortstackError(f"{place or name}: step {name} lacks {key}", hint=f"{key}: {parameter.help}")
    return found


def _value(
    step: str, parameter: Option, said: Said, value: Any, before: Sequence[Step], left_out: Mapping[str, str]
) -> Any:
    """One value: a reference, a path, or unchanged; None for a reference to a step that is skipped."""
    name = parameter.name
    if not isinstance(value, str):
        return value
    if name in IN_PLACE and (not value.startswith("$") or value == f"${MODEL}"):
        raise ShortstackError(
            f"{said.place}: {name} is {value}, which is not an output of this run",
            hint=f"{step} changes it in place: give a step, such as $prune",
        )
    if name in REFERENCES and value.startswith("$"):
        return None if value[1:] in left_out else _referred(step, name, said, value[1:], before)
    if name in OUTPUTS:
        return _inside(said, name, value)
    if name in SOURCES and name not in REFERENCES:
        return ",".join(_source(said, part.strip()) for part in value.split(","))
    if name in SOURCES or parameter.is_path:
        return _source(said, value, is_path=parameter.is_path)
    return value


def _referred(step: str, parameter: str, said: Said, name: str, before: Sequence[Step]) -> Reference:
    kinds = REFERENCES[parameter]
    if name == MODEL and "checkpoint" in kinds:
        return Reference(name)
    if name == RUN and parameter == "sources":
        return Reference(name)
    earlier = {one.name: one for one in before}
    if name not in earlier:
        names = [MODEL, *earlier]
        raise unknown(f"{said.place}: ${name}", name, names, f"step before {step}")
    if not set(kinds) & set(earlier[name].makes):
        raise ShortstackError(
            f"{said.place}: {parameter} is ${name}, a step that makes {' and '.join(earlier[name].makes)}; "
            f"expected {' or '.join(kinds)}",
            hint="name an earlier step that makes one",
        )
    return Reference(name)


def _source(said: Said, value: str, *, is_path: bool = False) -> str:
    """A model, text or path: relative to the file that names it, if it is one."""
    if said.folder is None or value.startswith("published:"):
        return value  # from the command line, where the shell and the working folder have their say
    before, place = before_and_place(value)
    if before and not is_path and not (said.folder / value).exists():
        return before + _source(said, place)
    if "://" in value:
        raise ShortstackError(f"{said.place}: {value}: URLs are not read", hint="download the file, and give its path")
    if value.startswith("~") or "$" in value:
        raise ShortstackError(
            f"{said.place}: {value}: recipes do not read home folders or environment variables",
            hint=f"a path relative to {said.folder}, or give it on the command line: --set step.key=PATH",
        )
    if Path(value).is_absolute():
        return value
    beside = said.folder / value
    is_shipped = said.folder in (SHIPPED, BASES)
    return str(beside) if not is_shipped and (is_path or value.startswith(".") or beside.exists()) else value


def _inside(said: Said, name: str, value: str) -> str:
    parts: Iterable[str] = Path(value).parts
    if not value or Path(value).is_absolute() or ".." in parts or value.startswith("~") or "$" in value:
        raise ShortstackError(
            f"{said.place}: {name} is {value!r}, expected a name inside the step's folder",
            hint=f"such as {name}: {name}",
        )
    return value
