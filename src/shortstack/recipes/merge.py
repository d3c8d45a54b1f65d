"""A recipe's text: found by name or path, with what it extends laid under it and what the command line says over it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shortstack.errors import ShortstackError, UsageError
from shortstack.recipes.safe_yaml import Loaded, load_yaml, parse_yaml
from shortstack.recipes.schema import TOP, unknown

SHIPPED = Path(__file__).parent / "shipped"
BASES = SHIPPED / "bases"
MODEL = "model"  # what `$model` means: the checkpoint that the recipe begins with
RUN = "run"  # what `$run` means to a report: all that the steps before it left behind
_LONGEST_CHAIN = 16  # of recipes that extend one another
_STEP_NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")
_TAKEN = ("logs", "run", "recipe", MODEL)  # names that something else in the run's folder or in recipes has


def shipped_recipes() -> dict[str, Path]:
    """The recipes in the package, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def find_recipe(name: str, beside: Path | None = None) -> Path:
    """The file of a recipe: by its name in the package, or by its path.

    Args:
        name: what the user or another recipe called it.
        beside: the folder that a path in another recipe is relative to.

    Raises:
        ShortstackError: there is none.
    """
    if "://" in name:
        raise ShortstackError(
            f"{name}: recipes are not fetched from the network", hint="download the file, and give its path"
        )
    known = {path.stem.lower(): path for path in (*BASES.glob("*.yaml"), *SHIPPED.glob("*.yaml"))}
    is_base = name.lower() in known and known[name.lower()].parent == BASES
    if name.lower() in known and (beside is not None or not is_base):
        return known[name.lower()]
    path = Path(name).expanduser() if beside is None else beside / name
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return path
    raise unknown(name, name, shipped_recipes(), "recipe")


@dataclass(frozen=True)
class Said:
    """A value, where it was said, and the folder that paths in it are relative to (None: where the user is)."""

    value: Any
    place: str
    folder: Path | None


@dataclass
class Draft:
    """A recipe while it is put together."""

    about: str = ""
    model: Said | None = None
    steps: dict[str, dict[str, Said]] = field(default_factory=dict)

    def lay_over(self, other: Draft) -> None:
        """What the other says counts; what it does not say stays."""
        self.about = other.about or self.about
        self.model = other.model or self.model
        for name, said in other.steps.items():
            self.steps.setdefault(name, {}).update(said)


def read_draft(path: Path, chain: tuple[Path, ...] = ()) -> Draft:
    """A file and what it extends, one laid over the other.

    Args:
        path: the file.
        chain: the files that lead here, for circles.

    Raises:
        ShortstackError: it is no recipe, as far as its form goes; names file and line.
    """
    if path.resolve() in chain or len(chain) >= _LONGEST_CHAIN:
        names = " -> ".join(one.name for one in (*chain, path))
        raise ShortstackError(f"{path}: recipes extend one another in a circle, or there are too many ({names})")
    loaded = load_yaml(path)
    top = _mapping(path, loaded, (), "a recipe is a mapping with `steps`")
    for key, value in top.items():
        if key not in TOP:
            raise unknown(_place(path, loaded, (key,)), key, TOP, "key of a recipe")
        is_list = key == "extends" and isinstance(value, list) and all(isinstance(part, str) for part in value)
        if key != "steps" and not isinstance(value, str) and not is_list:
            raise ShortstackError(
                f"{_place(path, loaded, (key,))}: {key} is {value!r:.60}, expected text", hint=TOP[key]
            )
    draft = Draft()
    bases = top.get("extends", [])
    for base in [bases] if isinstance(bases, str) else bases:
        draft.lay_over(read_draft(find_recipe(base, beside=path.parent), (*chain, path.resolve())))
    draft.about = top.get("about", draft.about)
    if "model" in top:
        draft.model = Said(top["model"], _place(path, loaded, ("model",)), path.parent)
    _read_steps(path, loaded, draft)
    return draft


def _read_steps(path: Path, loaded: Loaded, draft: Draft) -> None:
    """Lay the steps of one file over a draft."""
    for name, said in _mapping(path, loaded, ("steps",), TOP["steps"], optional=True).items():
        where = _place(path, loaded, ("steps", name))
        if said is None:
            if draft.steps.pop(name, None) is None:
                raise unknown(where, name, draft.steps, "step to take away")
            continue
        if not _STEP_NAME.fullmatch(name) or name in _TAKEN:
            raise ShortstackError(
                f"{where}: {name!r} is not allowed as the name of a step",
                hint=f"use lower case letters, digits, - and _, but not {', '.join(_TAKEN)}",
            )
        step = draft.steps.setdefault(name, {})
        for key, value in _mapping(path, loaded, ("steps", name), "a step is a mapping of options").items():
            step[key] = Said(value, _place(path, loaded, ("steps", name, key)), path.parent)


def _mapping(
    path: Path, loaded: Loaded, place: tuple[str, ...], expected: str, *, optional: bool = False
) -> dict[str, Any]:
    found = loaded.data
    for key in place:
        found = found.get(key) if isinstance(found, dict) else None
    if found is None and (optional or place[:1] == ("steps",)):
        return {}
    if not isinstance(found, dict):
        if isinstance(found, list):
            raise ShortstackError(
                f"{_place(path, loaded, place)}: found a list, expected a mapping",
                hint=f"write `name:` instead of `- name:`; {expected}",
            )
        shown = "nothing" if found is None else f"{found!r:.60}"
        raise ShortstackError(f"{_place(path, loaded, place)}: found {shown}, expected a mapping", hint=expected)
    return found


def _place(path: Path, loaded: Loaded, place: tuple[str, ...]) -> str:
    line = loaded.lines.get(place)
    return f"{path}, line {line}" if line else str(path)


def lay_setting(draft: Draft, setting: str) -> tuple[str, str]:
    """Lay one `step.key=value` of the command line over the draft; returns (step, key).

    Raises:
        ShortstackError: it has another form, or there is no such step.
    """
    way, equals, text = setting.partition("=")
    step, dot, key = way.strip().partition(".")
    place = f"--set {setting}"
    if not equals or not step or (dot and not key):
        raise UsageError(f"{place}: expected step.key=value", hint="such as --set prune.remove=6")
    if step not in draft.steps:
        raise unknown(place, step, draft.steps, "step")
    value = _set_value(text, place)
    if not dot:
        if value is not None:
            raise UsageError(
                f"{place}: expected step.key=value, or step=null", hint=f"options of {step}: shortstack recipes NAME"
            )
        del draft.steps[step]
    else:
        draft.steps[step][key] = Said(value, place, None)
    return step, key


def _set_value(text: str, place: str) -> Any:
    """A value of the command line: YAML, or plain text where it is none (`taylor:p=2`, `a: b`)."""
    try:
        value = parse_yaml(text, place).data
    except ShortstackError:
        return text
    return text if isinstance(value, dict) else value
