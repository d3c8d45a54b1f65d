"""What a recipe may say: pydantic models and a JSON schema for editors, both made of the stage functions' signatures."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model

from shortstack.common.options import Option, options_of
from shortstack.errors import ShortstackError, did_you_mean
from shortstack.registry import COMMANDS, Command, Kind

# What a run decides, or a user on the command line, and never a file that came from somewhere else.
NOT_IN_RECIPES = {
    "out", "force", "quiet", "dry_run", "restart", "weights_only_resume", "trust_remote_code", "allow_links",
    "engine_python", "engine_binary", "engine_args", "converter", "converter_python",  # programs of this machine
}  # fmt: skip
# Options that take what an earlier step left behind, as `$step`, and which kind of it.
REFERENCES: dict[str, tuple[Kind, ...]] = {
    "model": ("checkpoint",),
    "models": ("checkpoint",),
    "base": ("checkpoint",),
    "teacher": ("checkpoint",),
    "dense": ("checkpoint",),
    "of": ("checkpoint",),
    "draft": ("checkpoint",),
    "adapter": ("adapter",),
    "scores": ("scores",),
    "plan": ("plan",),
    "offline": ("teacher logits",),
    "results": ("results",),
    "sources": ("checkpoint", "scores", "plan", "results"),  # and `$run`: all that is there
    "directory": ("checkpoint",),
}
# Options whose checkpoint is changed in place: it is one that an earlier step of the same run made, and no other.
IN_PLACE = {"directory"}
# Options that may name a file or folder, besides those that are annotated as paths: models, and what is known by content.
CONTENTS = {"data", "eval_data", "prompt_template", "tokenizer"}
SOURCES = {"model", "models", "base", "teacher", "dense", "of", "draft", *CONTENTS}
# Paths that a stage writes besides OUT: they lie in the step's own folder.
OUTPUTS = {"csv", "plot"}
# Keys of a recipe, and of a step besides its stage's parameters, with what they mean.
TOP = {
    "about": "what this recipe does, in one line",
    "extends": "the recipe that this one extends, or several, applied in order: names in the package, or files",
    "model": "the checkpoint that the steps begin with: a directory, a hub id such as org/name@revision, or embedded",
    "steps": "the steps, in order: a name of your own, and what it does; null takes away a step of the extended recipe",
}
STEP = {
    "stage": "the command that this step runs, such as `retrain lora`; not needed if the step has the name of the command",
    "optional": "skip the step, with a message, if the packages that it needs are not installed",
}
_DRAFT = "https://json-schema.org/draft/2020-12/schema"


def stages() -> dict[str, Command]:
    """The commands that a step can be, by name."""
    return {name: command for name, command in COMMANDS.items() if command.step}


def step_options(command: Command) -> dict[str, Option]:
    """What a recipe may say of a command, by name."""
    return {name: option for name, option in command.options.items() if name not in NOT_IN_RECIPES}


def step_model(verb: str) -> type[BaseModel]:
    """The pydantic model of one stage's parameters. All may be left out: an extended recipe may say the others."""
    return _step_model(COMMANDS[verb].name, COMMANDS[verb].stage)


@functools.cache  # half the time of listing all recipes otherwise
def _step_model(verb: str, stage: typing.Callable[..., Any]) -> type[BaseModel]:
    fields: dict[str, Any] = {}
    options = {name: option for name, option in options_of(stage).items() if name not in NOT_IN_RECIPES}
    for name, parameter in options.items():
        default = None if parameter.default is inspect.Parameter.empty else parameter.default
        fields[name] = (_field_type(parameter) | None, Field(default, description=parameter.help))
    config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    return create_model(verb.title().replace(" ", ""), __config__=config, **fields)


def checked(verb: str, values: dict[str, Any], where: typing.Callable[[str], str]) -> dict[str, Any]:
    """The values of a step's parameters, checked one by one; numbers where text is expected have become text.

    Args:
        verb: the stage.
        values: what was said; entries that are None count as not said.
        where: parameter -> its place, for errors.

    Raises:
        ShortstackError: an unknown parameter, or a value of another type.
    """
    try:
        made = step_model(verb).model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            raise unknown(where(name), name, step_options(COMMANDS[verb]), f"option of {verb}") from None
        parameter = step_options(COMMANDS[verb])[name]
        choices = [] if parameter.many else ", ".join(_names(parameter.annotation)).split(", ")
        raise ShortstackError(
            f"{where(name)}: {name} is {values[name]!r:.60}, expected {_expected(parameter)}",
            hint=did_you_mean(str(values[name]), choices, otherwise=f"{name}: {parameter.help}"),
        ) from None
    return {name: getattr(made, name) for name, value in values.items() if value is not None}


def unknown(place: str, name: str, known: typing.Iterable[str], what: str) -> ShortstackError:
    """The error for a key that does not exist, with the nearest that does."""
    return ShortstackError(f"{place}: there is no {what} named {name!r}", hint=did_you_mean(name, known))


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, for editors (draft 2020-12)."""
    definitions = {verb.replace(" ", "-"): _step_schema(command) for verb, command in stages().items()}
    named = {
        verb: {"anyOf": [{"$ref": f"#/$defs/{verb}"}, *_with_stage_named(definitions), {"type": "null"}]}
        for verb in stages()
        if " " not in verb
    }
    return {
        "$schema": _DRAFT,
        "title": "shortstack recipe",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            **{name: {"type": "string", "description": TOP[name]} for name in ("about", "model")},
            "extends": {"type": ["string", "array"], "items": {"type": "string"}, "description": TOP["extends"]},
            "steps": {
                "type": "object",
                "description": TOP["steps"],
                "properties": named,
                # What an extended recipe has said of a step need not be said again, its stage included.
                "additionalProperties": {"anyOf": [*({"$ref": f"#/$defs/{name}"} for name in definitions), {"type": "null"}]},
            },
        },
        "$defs": definitions,
    }  # fmt: skip


def _with_stage_named(definitions: dict[str, Any]) -> list[dict[str, Any]]:
    """A step may have the name of one stage and be another."""
    return [{"allOf": [{"$ref": f"#/$defs/{name}"}, {"required": ["stage"]}]} for name in definitions]


def _step_schema(command: Command) -> dict[str, Any]:
    made = step_model(command.name).model_json_schema()
    properties = {name: {key: value for key, value in found.items() if key != "title"}
                  for name, found in made["properties"].items()}  # fmt: skip
    steering = {
        "stage": {"const": command.name, "description": STEP["stage"]},
        "optional": {"type": "boolean", "description": STEP["optional"], "default": False},
    }
    return {"type": "object", "description": command.summary, "additionalProperties": False,
            "properties": {**steering, **properties}}  # fmt: skip


def _as_text(value: Any) -> Any:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return str(value) if is_number else value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


_Text = Annotated[str, BeforeValidator(_as_text, json_schema_input_type=str | float)]


def _field_type(parameter: Option) -> Any:
    if parameter.many:
        return Annotated[list[_Text], BeforeValidator(_as_list, json_schema_input_type=str | list[str])]
    return _yaml_type(parameter.annotation)


def _yaml_type(annotation: Any) -> Any:
    """The type that a value has in YAML: paths are text."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return functools.reduce(lambda one, other: one | other, map(_yaml_type, typing.get_args(annotation)))
    return _Text if annotation in (Path, str) else annotation


def _expected(parameter: Option) -> str:
    if parameter.many:
        return "text or a list of texts"
    return " or ".join(dict.fromkeys(_names(parameter.annotation)))


def _names(annotation: Any) -> list[str]:
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return [name for part in typing.get_args(annotation) if part is not type(None) for name in _names(part)]
    if typing.get_origin(annotation) is Literal:
        return [", ".join(typing.get_args(annotation))]
    return [{bool: "true or false", int: "a whole number", float: "a number"}.get(annotation, "text")]
