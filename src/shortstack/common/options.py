"""Options of commands: parameters of a stage function, and fields of the frozen records that it takes.

Commands that share options share a record. Whoever calls a stage names fields and parameters alike,
`score("MODEL", samples=20)`; the command line, recipes and documents read the same names, types, defaults and help off
the signature and the docstrings, so that nothing about an option is written twice.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from shortstack.errors import UsageError, did_you_mean

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Option:
    """One option of a command.

    Attributes:
        name: as in Python.
        annotation: its type.
        default: its value where none is given; `inspect.Parameter.empty` where one is required.
        help: from the docstring.
        many: it takes any number of values, by position.
        positional: it is given by position.
        record: the parameter whose record has this as a field; None for a parameter of the function itself.
    """

    name: str
    annotation: Any
    default: Any
    help: str
    many: bool = False
    positional: bool = False
    record: str | None = None

    @property
    def is_path(self) -> bool:
        """Whether it names a file or folder, and nothing else."""
        return "Path" in str(self.annotation)


def stage(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """Let a function that takes records of options be called with their fields as keywords, too.

    A field overrides what the record given beside it, or the function's default record, says.
    """

    @functools.wraps(function)
    def called(*positional: Any, **given: Any) -> _Result:
        return function(*positional, **_gathered(function, given))

    called.__signature__ = _flat_signature(function)  # type: ignore[attr-defined]
    return called


def call_with(function: Callable[..., _Result], values: Mapping[str, Any]) -> _Result:
    """Call a stage with values by option name; a list fills the positional ones that take many."""
    options = options_of(function)
    many = [value for name in values if options[name].many for value in values[name]]
    return function(*many, **{name: value for name, value in values.items() if not options[name].many})


def check_records(function: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Make the records that a stage would be called with: they refuse what they cannot hold.

    Raises:
        UsageError: a value is out of range, or has no effect beside the others.
    """
    function = inspect.unwrap(function)
    options = options_of(function)
    _gathered(function, {name: value for name, value in values.items() if options[name].record is not None})


@functools.cache
def options_of(function: Callable[..., Any]) -> dict[str, Option]:
    """All options of a stage by name, in the order of its signature, with the fields of records in their place."""
    function = inspect.unwrap(function)
    hints, helps = typing.get_type_hints(function), described(function)
    options: dict[str, Option] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if _is_record(parameter.default):
            record: Any = type(parameter.default)
            types, texts = typing.get_type_hints(record), described(record)
            for field in dataclasses.fields(record):
                default = getattr(parameter.default, field.name)
                options[field.name] = Option(field.name, types[field.name], default, texts[field.name], record=name)
        else:
            many = parameter.kind is inspect.Parameter.VAR_POSITIONAL
            positional = many or parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
            options[name] = Option(name, hints[name], parameter.default, helps[name], many, positional)
    return options


def option_text(name: str, value: Any) -> str:
    """An option with its value, as it is given on the command line."""
    dashed = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{dashed}" if value else f"--no-{dashed}"
    return f"--{dashed} {value}"


def refuse_idle(record: Any, names: Iterable[str], why: str) -> None:
    """Refuse options that have no effect in the chosen mode; those that are at their defaults ask for nothing.

    Args:
        record: the record that holds them.
        names: its fields that have no effect.
        why: what takes their effect away, as the end of a sentence.

    Raises:
        UsageError: one of them was given.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(record)}
    given = [name for name in names if getattr(record, name) != defaults[name]]
    if given:
        shown = ", ".join(option_text(name, getattr(record, name)) for name in given)
        raise UsageError(f"{shown}: no effect {why}", hint=f"leave {'it' if len(given) == 1 else 'them'} out")


def expect(fits: bool, name: str, value: Any, expected: str) -> None:
    """Refuse the value of an option.

    Raises:
        UsageError: it does not fit.
    """
    if not fits:
        raise UsageError(f"{option_text(name, value)}: expected {expected}")


def described(documented: Any) -> dict[str, str]:
    """Parameter or attribute -> its help, from a Google docstring; of a record that extends another, from both."""
    import docstring_parser

    helps: dict[str, str] = {}
    for one in reversed(documented.__mro__[:-1]) if inspect.isclass(documented) else (documented,):
        parsed = docstring_parser.parse(inspect.getdoc(one) or "", style=docstring_parser.DocstringStyle.GOOGLE)
        helps |= {entry.arg_name: " ".join((entry.description or "").split()) for entry in parsed.params}
    return helps


def _is_record(default: Any) -> bool:
    return dataclasses.is_dataclass(default) and not isinstance(default, type)


def _gathered(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords with those that are fields put into their records."""
    parameters = inspect.signature(function).parameters
    owners = {
        field.name: name
        for name, parameter in parameters.items()
        if _is_record(parameter.default)
        for field in dataclasses.fields(parameter.default)
    }
    direct = {name: value for name, value in given.items() if name in parameters}
    fields: dict[str, dict[str, Any]] = {}
    for name in given.keys() - direct.keys():
        if name not in owners:
            known = [*(one for one in parameters if one not in owners.values()), *owners]
            raise TypeError(f"{function.__name__}() has no option {name!r}; {did_you_mean(name, known)}")
        fields.setdefault(owners[name], {})[name] = given[name]
    for record, values in fields.items():
        direct[record] = dataclasses.replace(direct.get(record, parameters[record].default), **values)
    return direct


def _flat_signature(function: Callable[..., Any]) -> inspect.Signature:
    """The signature that callers see: fields in the place of their record."""
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    flat: list[inspect.Parameter] = []
    signature = inspect.signature(function)
    for name, parameter in signature.parameters.items():
        if _is_record(parameter.default):
            flat += [
                inspect.Parameter(
                    field.name, keyword_only, default=getattr(parameter.default, field.name), annotation=field.type
                )
                for field in dataclasses.fields(parameter.default)
            ]
        else:
            flat.append(parameter.replace(name=name))
    return signature.replace(parameters=flat)
