"""A run's folder: `run.json`, one sub-folder per step, `logs/`, and `recipe.yaml`, which runs the same again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from shortstack.common.json_text import read_json
from shortstack.common.options import option_text
from shortstack.errors import ShortstackError, system_reason
from shortstack.recipes.cache_keys import output_identity
from shortstack.recipes.merge import MODEL, RUN
from shortstack.recipes.resolve import Recipe, Reference, Step
from shortstack.recipes.schema import OUTPUTS, REFERENCES
from shortstack.runtime.atomic_output import write_file, write_json
from shortstack.runtime.workspace import differences

RUN_FILE, RECIPE_FILE = "run.json", "recipe.yaml"
_STEERING = ("fresh",)  # how a run goes, and not what is made
# What became of a step in earlier runs: nothing, begun, done, or either of the two with other settings than now.
Standing = Literal["new", "begun", "done", "other"]
SCHEMA = 1


@dataclass
class RunFolder:
    """Where a run leaves everything.

    Attributes:
        path: the folder.
        record: the content of run.json: recipe, model, and per step its key, state, seconds, output and text.
    """

    path: Path
    record: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run's folder, or a new one; nothing is written yet.

        Raises:
            ShortstackError: something else is there.
        """
        file = path / RUN_FILE
        if not path.exists():
            return cls(path)
        if not path.is_dir():
            raise ShortstackError(f"{path}: exists and is not a directory", hint="choose another --out")
        if not file.is_file():
            if any(one for one in path.iterdir() if not one.name.startswith(".")):
                raise ShortstackError(
                    f"{path}: exists and holds no run of shortstack (no {RUN_FILE})", hint="choose another --out"
                )
            return cls(path)
        try:
            record = read_json(file.read_bytes())
            if record["schema"] != SCHEMA or not isinstance(record["steps"], dict):
                raise ValueError(f"schema {record['schema']!r}, expected {SCHEMA}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ShortstackError(
                f"{file}: cannot be read ({system_reason(error)})",
                hint="choose another --out, or remove it: the run then starts from the first step",
            ) from None
        return cls(path, record)

    def check_recipe(self, recipe: Recipe) -> None:
        """Refuse the folder of another recipe. A recipe is known by its file, or by what it says, however it is named.

        Raises:
            ShortstackError: another one was run here.
        """
        name, file = self.record.get("recipe"), self.record.get("file")
        # Earlier versions recorded the name alone.
        is_same_file = file == str(recipe.file) if file is not None else name in (None, recipe.name)
        if is_same_file or self._says(recipe):
            return
        here, other = (recipe.name, name) if recipe.name != name else (str(recipe.file), file)
        raise ShortstackError(
            f"{self.path}: holds a run of {other}, not of {here}",
            hint="choose another --out, or --force to run it here",
        )

    def _says(self, recipe: Recipe) -> bool:
        """Whether what was run here says the same as a recipe."""
        try:
            return (self.path / RECIPE_FILE).read_text(encoding="utf-8") == recipe.to_yaml()
        except (OSError, UnicodeDecodeError):
            return False

    def begin(self, recipe: Recipe, step: Step, key: Mapping[str, Any]) -> None:
        """Write down what is run, and that this step of it has begun."""
        steps = self.record.get("steps", {})
        kept = {step.name: steps[step.name] for step in recipe.steps if step.name in steps}
        others = {name: one for name, one in steps.items() if name not in kept}
        self.record = {
            "schema": SCHEMA, "recipe": recipe.name, "file": str(recipe.file), "about": recipe.about, "model": recipe.model,
            "order": [step.name for step in recipe.steps], "left_out": recipe.left_out, "steps": {**kept, **others},
        }  # fmt: skip
        write_file(self.path / RECIPE_FILE, recipe.to_yaml().encode())
        self.note(step, key=key, state="begun")

    def save(self) -> None:
        """Write run.json."""
        write_json(self.path / RUN_FILE, self.record)

    def log_file(self, step: Step) -> Path:
        """What a step says goes here, too."""
        return self.path / "logs" / f"{step.name}.log"

    def output(self, step: Step) -> Path:
        """What a step leaves behind: a file in its folder, or the folder itself."""
        name = next(iter(step.command.makes.values()), f"{step.command.name}.json")
        return self.path / step.name / name if name else self.path / step.name

    def noted(self, step: Step) -> dict[str, Any]:
        """What run.json says of a step; empty where it has not begun."""
        found: dict[str, Any] = self.record.get("steps", {}).get(step.name, {})
        return found

    def note(self, step: Step, **entries: Any) -> None:
        """Say more of a step, and save."""
        self.record["steps"][step.name] = {
            **self.noted(step), "output": str(self.output(step).relative_to(self.path)), **entries
        }  # fmt: skip
        self.save()

    def identity(self, step: Step) -> str | None:
        """Of what a step has left behind, as it is now."""
        return output_identity(self.output(step))

    def standing(self, step: Step, key: Mapping[str, Any]) -> tuple[Standing, list[str]]:
        """(what earlier runs have done of a step, what is different now).

        Args:
            step: the step.
            key: all that makes it now.
        """
        noted, identity = self.noted(step), self.identity(step)
        is_done = noted.get("state") == "done"
        if not noted or (is_done and identity is None):
            return "new", []
        changed = differences(noted.get("key"), key)
        if is_done and not changed and identity != noted.get("identity"):
            changed = [f"{self.output(step)} was changed since"]
        if changed:
            return "other", changed
        return ("done" if is_done else "begun"), []


def command_line(recipe: Recipe, step: Step) -> str:
    """A step as the command that does the same, where the run's folder is the working folder."""
    made = {one.name: one.command.makes_with(one.values) for one in recipe.steps}

    def word(name: str, value: Any) -> str:
        if isinstance(value, Reference):
            if value.step in (MODEL, RUN):
                return shlex.quote(recipe.model if value.step == MODEL else ".")
            places = made[value.step]
            inside = next((places[kind] for kind in REFERENCES[name] if kind in places), "")
            return shlex.quote(str(PurePosixPath(value.step) / inside))
        return shlex.quote(f"{step.name}/{value}" if name in OUTPUTS else str(value))

    words, options = ["shortstack", *step.command.name.split()], []
    for name, value in step.values.items():
        option = step.command.options[name]
        if name in _STEERING or value is None or (value is False and option.default is False):
            continue
        if option.positional:
            words += [word(name, part) for part in (value if isinstance(value, list) else [value])]
        elif isinstance(value, bool):
            options.append(option_text(name, value))
        else:
            parts = value if isinstance(value, list) else [value]
            options.append(f"--{name.rstrip('_').replace('_', '-')} {','.join(word(name, part) for part in parts)}")
    if "out" in step.command.options:
        inside = next(iter(step.command.makes.values()), f"{step.command.name}.json")
        options.append(f"--out {shlex.quote(str(PurePosixPath(step.name) / inside))}")
    return " ".join([*words, *options])
