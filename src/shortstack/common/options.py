"""Options of commands: parameters of a stage function, and fields of the frozen records that it takes.

Commands that share options share a record. Whoever calls a stage names fields and parameters alike,
`score("MODEL", samples=20)`; the command line, recipes and documents read the same names, types, defaults and help off
the signature and the docstrings, so that nothing about an option is written twice.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from shortstack.common.clock import timed
from shortstack.common.docstrings import described, flattened_doc
from shortstack.common.keywords import as_typed, errors_in_python, is_typed
from shortstack.common.option_values import fitted
from shortstack.common.own_inputs import refuse_own_inputs
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
        replaces: options that it takes the place of, where a recipe has them and it is set by hand (`REPLACES` of a record).
        heading: what help shows it under: what its record is, up to the first comma or colon; "" without a record.
    """

    name: str
    annotation: Any
    default: Any
    help: str
    many: bool = False
    positional: bool = False
    record: str | None = None
    replaces: tuple[str, ...] = ()
    heading: str = ""

    @property
    def dashed(self) -> str:
        """Its name on the command line."""
        return f"--{self.name.strip('_').replace('_', '-')}"

    @property
    def is_required(self) -> bool:
        """Whether it must be given."""
        return self.default is inspect.Parameter.empty and not self.many

    @property
    def is_path(self) -> bool:
        """Whether it names a file or folder, and nothing else."""
        return "Path" in str(self.annotation)


@dataclass(frozen=True)
class Options:
    """A record of options extends this: its values are brought into form and checked, whoever makes it.

    Made by hand, `BlockChoice(blocks=[10, 11])`, it takes what a stage takes as a keyword, and what it refuses it refuses
    in the words of Python, unless the command line made it.

    What several records share is a record that they extend; its fields would stand before their own, unless `LAST` says
    otherwise (`fields_of`).
    """

    LAST: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        checks = cls.__dict__.get("__post_init__")
        if checks is not None:
            cls.__post_init__ = _checked_by(checks)  # type: ignore[method-assign, assignment]

    def __post_init__(self) -> None:
        if is_typed():  # of the command line, a recipe or a stage, which have brought them into form
            return
        types: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not field.default:
                types = types or typing.get_type_hints(type(self), include_extras=True)
                object.__setattr__(self, field.name, fitted(field.name, types[field.name], value))


def _checked_by(checks: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(checks)
    def checked(self: Options) -> None:
        Options.__post_init__(self)
        if is_typed():
            return checks(self)
        types = typing.get_type_hints(type(self))
        known = {one.name: Option(one.name, types[one.name], one.default, "") for one in dataclasses.fields(self)}
        with errors_in_python(known, vars(self)):
            return checks(self)

    return checked


def stage(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """The stage function of a command: its options are checked, and fields of its records are keywords, too.

    A field overrides what the record given beside it, or the function's default record, says. A value that is not of its
    option's type, or none of its choices, is refused by name (`option_values.fitted`), and so is an output that is one of
    the inputs (`own_inputs`).
    """

    @functools.wraps(function)
    def called(*positional: Any, **given: Any) -> _Result:
        types = _types_of(function)
        names = _positional(function, len(positional))
        values = [fitted(name, types[name], value) for name, value in zip(names, positional, strict=False)]
        checked = {name: fitted(name, types[name], value) if name in types else value for name, value in given.items()}
        refuse_own_inputs({"by position": [*values, *positional[len(names) :]], **checked})
        with timed():
            return function(*values, *positional[len(names) :], **_gathered(function, checked))

    return _documented(called, function)


def takes_fields(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """Let a function that takes records be called with their fields as keywords, too; nothing is checked."""

    @functools.wraps(function)
    def called(*positional: Any, **given: Any) -> _Result:
        return function(*positional, **_gathered(function, given))

    return _documented(called, function)


def call_with(function: Callable[..., _Result], values: Mapping[str, Any]) -> _Result:
    """Call a stage with values by option name; a list fills the positional ones that take many, after those before them."""
    options = options_of(function)
    many = [value for name in values if options[name].many for value in values[name]]
    before = [
        name for name, option in options.items() if many and option.positional and not option.many and name in values
    ]
    named = {name: value for name, value in values.items() if not options[name].many and name not in before}
    return function(*(values[name] for name in before), *many, **named)


def records_of(function: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The records that a stage would be called with, by parameter: they refuse what they cannot hold.

    Raises:
        UsageError: a value is out of range, or has no effect beside the others.
    """
    function = inspect.unwrap(function)
    owners = _owners(function)
    made = _gathered(function, {name: value for name, value in values.items() if name in owners})
    parameters = inspect.signature(function).parameters
    return {name: one.default for name, one in parameters.items() if _is_record(one.default)} | made


@functools.cache
def options_of(function: Callable[..., Any]) -> dict[str, Option]:
    """All options of a stage by name, in the order of its signature, with the fields of records in their place."""
    function = inspect.unwrap(function)
    hints, helps = typing.get_type_hints(function), described(function)
    options: dict[str, Option] = {}
    owners = _owners(function)
    for name, parameter in inspect.signature(function).parameters.items():
        if _is_record(parameter.default):
            record: Any = type(parameter.default)
            types, texts = typing.get_type_hints(record), described(record)
            for field in fields_of(record):
                default = getattr(parameter.default, field.name)
                text = _help_of(f"{record.__name__}.{field.name}", field.name, texts, "Attributes")
                options[field.name] = Option(
                    field.name, types[field.name], default, text, record=owners[field.name],
                    replaces=getattr(record, "REPLACES", {}).get(field.name, ()), heading=_heading(record),
                )  # fmt: skip
        else:
            many = parameter.kind is inspect.Parameter.VAR_POSITIONAL
            positional = many or parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
            text = _help_of(f"{function.__name__}({name})", name, helps, "Args")
            options[name] = Option(name, hints[name], parameter.default, text, many, positional)
    return options


def fields_of(record: type[Any]) -> list[dataclasses.Field[Any]]:
    """The fields of a record in the order in which they are shown: those that its `LAST` names stand behind all others."""
    last: tuple[str, ...] = getattr(record, "LAST", ())
    fields = {one.name: one for one in dataclasses.fields(record)}
    return [*(one for name, one in fields.items() if name not in last), *(fields[name] for name in last)]


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


def _is_record(default: Any) -> bool:
    return dataclasses.is_dataclass(default) and not isinstance(default, type)


def _heading(record: type) -> str:
    return re.split(r"[,:;]| \(|\.(?=\s|$)", inspect.getdoc(record) or "", maxsplit=1)[0]


def _help_of(what: str, name: str, helps: Mapping[str, str], section: str) -> str:
    if not helps.get(name):
        raise TypeError(f"{what} has no help: give it a line under `{section}:` in the docstring")
    return helps[name]


@functools.cache
def _owners(function: Callable[..., Any]) -> dict[str, str]:
    """Field -> the parameter whose record has it.

    Raises:
        TypeError: two records have a field of one name, or a record one of a parameter's name.
    """
    owners: dict[str, str] = {}
    parameters = inspect.signature(inspect.unwrap(function)).parameters
    for name, parameter in parameters.items():
        for field in dataclasses.fields(parameter.default) if _is_record(parameter.default) else ():
            if field.name in owners or field.name in parameters:
                other = f"of its record {owners[field.name]}" if field.name in owners else "of its own"
                raise TypeError(
                    f"{function.__name__}: {field.name} is an option {other} and a field of {name}; rename one of them"
                )
            owners[field.name] = name
    return owners


@functools.cache
def _types_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Option or record -> its type, with its `Form`."""
    types = typing.get_type_hints(function, include_extras=True)
    for parameter in inspect.signature(function).parameters.values():
        if _is_record(parameter.default):
            types |= typing.get_type_hints(type(parameter.default), include_extras=True)
    return types


def _positional(function: Callable[..., Any], count: int) -> list[str]:
    """The parameters that so many values by position go to; those too many go to none."""
    names: list[str] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            return (names + [name] * count)[:count]
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
            names.append(name)
    return names[:count]


def _documented(called: Callable[..., _Result], function: Callable[..., _Result]) -> Callable[..., _Result]:
    """With the signature and the docstring that callers see: fields in the place of their records."""
    _owners(function)  # raises where two options have one name
    records = {
        name: (type(parameter.default), [field.name for field in fields_of(type(parameter.default))])
        for name, parameter in inspect.signature(function).parameters.items()
        if _is_record(parameter.default)
    }
    called.__signature__ = _flat_signature(function)  # type: ignore[attr-defined]
    called.__doc__ = flattened_doc(function, records)
    return called


def _gathered(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords with those that are fields put into their records."""
    parameters = inspect.signature(function).parameters
    owners = _owners(function)
    direct = {name: value for name, value in given.items() if name in parameters}
    fields: dict[str, dict[str, Any]] = {}
    for name in given.keys() - direct.keys():
        if name not in owners:
            near = did_you_mean(name, [*parameters, *owners])
            raise TypeError(f"{function.__name__}() has no option {name!r}; {near}")
        fields.setdefault(owners[name], {})[name] = given[name]
    with as_typed():
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
                for field in fields_of(type(parameter.default))
            ]
        else:
            flat.append(parameter.replace(name=name))
    return signature.replace(parameters=flat)
