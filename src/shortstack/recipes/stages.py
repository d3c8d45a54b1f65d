"""The stages that a step can be: which function, what it leaves behind, and what of its parameters a recipe may say.

Names, types, defaults and help are the function's own: its signature and its docstring are read, nothing is repeated.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from shortstack.registry import VERBS

Kind = Literal["checkpoint", "adapter", "scores", "plan", "lessons", "results", "text"]

# What a run decides, or a user on the command line, and never a file that came from somewhere else.
NOT_IN_RECIPES = {
    "out", "force", "quiet", "dry_run", "restart", "weights_only_resume", "trust_remote_code", "allow_links",
}  # fmt: skip
# Parameters that take what an earlier step left behind, as `$step`, and which kind of it.
REFERENCES: dict[str, tuple[Kind, ...]] = {
    "model": ("checkpoint",),
    "models": ("checkpoint",),
    "base": ("checkpoint",),
    "teacher": ("checkpoint",),
    "dense": ("checkpoint",),
    "adapter": ("adapter",),
    "scores": ("scores",),
    "plan": ("plan",),
    "offline": ("lessons",),
    "results": ("results",),
}
# Parameters that name models or texts, besides those that are annotated as paths.
SOURCES = {"model", "models", "base", "teacher", "dense", "data", "eval_data"}
# Paths that a stage writes besides OUT: they lie in the step's own folder.
OUTPUTS = {"csv"}


@dataclass(frozen=True)
class Parameter:
    """One parameter of a stage that a recipe may say.

    Attributes:
        name: as in Python.
        annotation: its type.
        default: what it is where nothing is said; `inspect.Parameter.empty` where something must be said.
        help: from the docstring.
        many: it takes a list.
        record: the name of the argument that is a record and has this as a field; None for an argument of its own.
    """

    name: str
    annotation: Any
    default: Any
    help: str
    many: bool = False
    record: str | None = None

    @property
    def is_path(self) -> bool:
        """Whether it names a file or folder, and nothing else."""
        return "Path" in str(self.annotation)


@dataclass(frozen=True)
class Stage:
    """One kind of step.

    Attributes:
        verb: the command's name.
        out: what OUT is called in the step's folder; "" where OUT is the folder itself; None where the function
            writes nothing, and the run writes what it returned.
        makes: what later steps can use.
        parallel: several processes that were started together work on it together.
    """

    verb: str
    out: str | None
    makes: Kind
    parallel: bool = False

    @property
    def line(self) -> str:
        """What it does, in one line."""
        return VERBS[self.verb].line

    @functools.cached_property
    def function(self) -> Callable[..., Any]:
        """The stage function."""
        module, _, name = VERBS[self.verb].function.partition(":")
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return found

    @functools.cached_property
    def parameters(self) -> dict[str, Parameter]:
        """What a recipe may say of this stage, in the order of the signature."""
        found = _parameters(self.function)
        return {name: parameter for name, parameter in found.items() if name not in NOT_IN_RECIPES}

    @functools.cached_property
    def takes(self) -> frozenset[str]:
        """All that the function takes, also what recipes may not say."""
        return frozenset(_parameters(self.function))

    def call(self, values: Mapping[str, Any]) -> Any:
        """Call the function with values by parameter name; those of records are gathered."""
        known = _parameters(self.function)
        positional: list[Any] = []
        direct: dict[str, Any] = {}
        records: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            parameter = known[name]
            if parameter.record is not None:
                records.setdefault(parameter.record, {})[name] = value
            elif parameter.many:
                positional += value
            else:
                direct[name] = value
        for name, fields in records.items():
            default = inspect.signature(self.function).parameters[name].default
            direct[name] = dataclasses.replace(default, **fields)
        return self.function(*positional, **direct)


@functools.cache
def _parameters(function: Callable[..., Any]) -> dict[str, Parameter]:
    hints = typing.get_type_hints(function)
    helps = _described(function)
    found: dict[str, Parameter] = {}
    for name, one in inspect.signature(function).parameters.items():
        if dataclasses.is_dataclass(one.default):
            record: Any = type(one.default)
            fields, described = typing.get_type_hints(record), _described(record)
            for field in dataclasses.fields(record):
                value = getattr(one.default, field.name)
                found[field.name] = Parameter(field.name, fields[field.name], value, described[field.name], record=name)
        else:
            many = one.kind is inspect.Parameter.VAR_POSITIONAL
            found[name] = Parameter(name, hints[name], one.default, helps[name], many=many)
    return found


def _described(documented: Any) -> dict[str, str]:
    """Parameter or attribute -> its help, from a docstring."""
    import docstring_parser

    parsed = docstring_parser.parse(inspect.getdoc(documented) or "", style=docstring_parser.DocstringStyle.GOOGLE)
    return {one.arg_name: " ".join((one.description or "").split()) for one in parsed.params}


STAGES: dict[str, Stage] = {
    stage.verb: stage
    for stage in (
        Stage("info", None, "text"),
        Stage("check", None, "text"),
        Stage("score", "scores.json", "scores", parallel=True),
        Stage("plan", "plan.json", "plan"),
        Stage("prune", "", "checkpoint"),
        Stage("retrain lora", "", "checkpoint", parallel=True),
        Stage("retrain cpt", "", "checkpoint", parallel=True),
        Stage("retrain distill", "", "checkpoint", parallel=True),
        Stage("merge", "", "checkpoint"),
        Stage("teach", "", "lessons"),
        Stage("eval ppl", "results.json", "results"),
        Stage("eval zeroshot", "results.json", "results"),
        Stage("eval generation", "results.json", "results"),
        Stage("eval samples", "results.json", "results"),
        Stage("eval all", "results.json", "results"),
        Stage("agree", "agreement.json", "text"),
        Stage("compare", "comparison.json", "text"),
    )
}
