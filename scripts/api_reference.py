"""The Python reference: every public name of shortstack, out of signatures and docstrings."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterable
from pathlib import Path
from types import UnionType
from typing import Any

import docstring_parser
from docstring_parser import Docstring, DocstringParam

import shortstack
from shortstack.common.option_values import Form
from shortstack.common.options import fields_of
from shortstack.common.shown import Shown
from shortstack.registry import Command, public_commands

ROOT = Path(__file__).resolve().parents[1]
EVERYWHERE = ("to_text", "to_json", "table_rows", "to_pandas")  # of every result, described once
HEAD = """\
# Python

Made by `scripts/make_docs.py` from signatures and docstrings. `import shortstack` takes no time: a name is imported when
it is first used.

Every stage is a function that takes values and returns a record. Its options are keywords with the names of the command
line (`--seq-len` is `seq_len`, `--no-plus` is `plus=False`). A path may be a string or a `Path`; where the command line
takes values with commas, Python also takes a list. A function changes nothing for the process that it runs in.

What a stage returns can be printed (`print(result)` is the table of the command line), shows itself as a table in a
notebook, and has `to_text()`, `to_json()` (what `--json` prints), `table_rows()` (the figures as rows) and `to_pandas()`
(the same as a data frame, where pandas is installed).

Errors are [`ShortstackError`](#shortstackerror): one or two lines that say what was found, what was expected and what to do
next. Wrong or contradictory options are its subclass [`UsageError`](#usageerror).
"""


def reference_page() -> str:
    """The whole page."""
    stages = {name: command for name, command in public_commands().items() if name != "evaluate"}
    others = {name: getattr(shortstack, name) for name in shortstack.RECORDS}
    records = {
        name: one for name, one in others.items() if not issubclass_of(one, BaseException) and isinstance(one, type)
    }
    options = {name: one for name, one in records.items() if is_option(name)}
    found = {name: one for name, one in records.items() if name not in options}
    for command in stages.values():
        found |= {one.__name__: one for result in returned(command.stage) for one in with_parts(result)}
    readers = {name: one for name, one in others.items() if not isinstance(one, type)}
    errors = {name: one for name, one in others.items() if issubclass_of(one, BaseException)}
    parts = [HEAD, "## Stages", "", *(line for name in stages for line in stage_lines(name, stages[name]))]
    parts += ["## Readers", "", *(line for name in readers for line in function_lines(name, readers[name]))]
    parts += ["## Results", "", *(line for name in sorted(found) for line in record_lines(name, found[name]))]
    parts += ["## Options as records", "", "A record of options can be given whole; keywords override its fields.", ""]
    parts += [line for name in options for line in record_lines(name, options[name])]
    parts += ["## Errors", "", *(line for name in errors for line in error_lines(name, errors[name]))]
    return "\n".join(parts).rstrip() + "\n"


def is_option(name: str) -> bool:
    """Whether a record holds options of a stage."""
    return name.endswith(("Options", "Steps", "Choice", "Request")) or name in ("LoRA", "Teaching")


def issubclass_of(one: Any, kind: type) -> bool:
    """Whether it is a class of a kind."""
    return isinstance(one, type) and issubclass(one, kind)


def returned(function: Any) -> list[type]:
    """The classes that a stage returns."""
    hint = typing.get_type_hints(inspect.unwrap(function))["return"]
    kinds = typing.get_args(hint) if isinstance(hint, UnionType) else (hint,)
    return [kind for kind in kinds if dataclasses.is_dataclass(kind) and isinstance(kind, type)]


def with_parts(record: type) -> list[type]:
    """A record, the records in its fields, and those in theirs."""
    known = [record]
    for one in known:
        kinds = [leaf for hint in typing.get_type_hints(one).values() for leaf in leaves(hint)]
        known += [kind for kind in dict.fromkeys(kinds) if dataclasses.is_dataclass(kind) and kind not in known]
    return known


def leaves(hint: Any) -> list[Any]:
    """The types that a type is made of: of `list[Figure | None]`, Figure and None."""
    parts = typing.get_args(hint)
    return [leaf for part in parts for leaf in leaves(part)] if parts else [hint]


def stage_lines(name: str, command: Command) -> list[str]:
    """One stage."""
    also = " `shortstack.evaluate` is the same function." if name == "evaluate_ppl" else ""
    anchor = command.name.replace(" ", "-")
    note = f"On the command line: [`shortstack {command.name}`](commands.md#{anchor}).{also}"
    if command.extra:
        note += f" Needs {', '.join(f'`{one}`' for one in command.needs)}: `pip install {command.install}`."
    return function_lines(name, command.stage, note)


def function_lines(name: str, function: Any, note: str = "") -> list[str]:
    """A function: how it is called, what it does, its parameters, what it returns and raises."""
    parsed = docstring_parser.parse(inspect.getdoc(function) or "")
    signature = inspect.signature(function)
    call = f"shortstack.{name}({short(signature)}) -> {kind_of(signature.return_annotation)}"
    lines = [f"### {name}", "", "```text", call, "```", "", *prose(parsed)]
    lines += [*([note, ""] if note else []), f"Defined in `{source_of(function)}`.", ""]
    types = hints_of(function)
    rows = [
        (
            f"`{stars(one)}{one.name}`",
            cell(kind_of(types.get(one.name, ""))),
            default_of(one.default),
            text_of(parsed, one.name),
        )
        for one in signature.parameters.values()
    ]
    named = set(signature.parameters)
    rows += [
        (f"`{one.arg_name}`", "record", "", cell(one.description or ""))
        for one in parsed.params
        if one.arg_name.lstrip("*") not in named
    ]
    lines += table(("parameter", "type", "default", ""), rows)
    if parsed.returns is not None:
        lines += [f"**Returns** {cell(parsed.returns.description or '')}", ""]
    return lines + raises(parsed)


def record_lines(name: str, record: type) -> list[str]:
    """A record: what it is, its fields, its methods."""
    parsed = docstring_parser.parse(inspect.getdoc(record) or "")
    types = typing.get_type_hints(record, include_extras=True)
    public, given = name in shortstack.RECORDS, is_option(name)
    lines = [f"### {name}", "", *prose(parsed)]
    where = f"`shortstack.{name}`, defined in" if public else "Defined in"
    lines += [f"{where} `{source_of(record)}`.", ""]
    fields = fields_of(record) if dataclasses.is_dataclass(record) else []
    rows = [
        (
            f"`{field.name}`",
            cell(kind_of(types[field.name], given=given)),
            default_of(field.default),
            told(record, field.name),
        )
        for field in fields
        if not field.name.startswith("_")
    ]
    lines += table(("attribute", "type", "default", ""), rows)
    methods = [
        (f"`{one}`", cell(first_sentence(inspect.getdoc(value) or "")))
        for one, value in sorted(vars(record).items())
        if not one.startswith("_") and is_method(value) and not (issubclass(record, Shown) and one in EVERYWHERE)
    ]
    return lines + table(("also has", ""), methods)


def error_lines(name: str, error: type) -> list[str]:
    """An error class."""
    parsed = docstring_parser.parse(inspect.getdoc(error) or "")
    rows = [(f"`{one.arg_name}`", cell(one.description or "")) for one in parsed.params]
    return [f"### {name}", "", *prose(parsed), *table(("attribute", ""), rows)]


def is_method(value: Any) -> bool:
    """Whether it is a function or a property of a class."""
    return isinstance(value, property | classmethod | staticmethod) or inspect.isfunction(value)


def prose(parsed: Docstring) -> list[str]:
    """What a docstring says before its sections."""
    return [part for text in (parsed.short_description, parsed.long_description) if text for part in (text, "")]


def short(signature: inspect.Signature) -> str:
    """The positional parameters, and dots for keywords."""
    given = [stars(one) + one.name for one in signature.parameters.values() if one.kind is not one.KEYWORD_ONLY]
    keywords = any(one.kind is one.KEYWORD_ONLY for one in signature.parameters.values())
    return ", ".join([*given, *(["..."] if keywords else [])])


def stars(parameter: inspect.Parameter) -> str:
    """`*` before what takes many values."""
    return "*" if parameter.kind is parameter.VAR_POSITIONAL else ""


def hints_of(function: Any) -> dict[str, Any]:
    """The types of a function's parameters, and of the fields of the records that it takes."""
    function = inspect.unwrap(function)
    types = typing.get_type_hints(function, include_extras=True)
    for parameter in inspect.signature(function).parameters.values():
        if dataclasses.is_dataclass(parameter.default):
            types |= typing.get_type_hints(type(parameter.default), include_extras=True)
    return types


def kind_of(annotation: Any, *, given: bool = True) -> str:
    """A type, as a reader knows it; choices are listed. What is given may be text where the type is a path."""
    if isinstance(annotation, str):
        return annotation
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        form = next((mark for mark in parts[1:] if isinstance(mark, Form)), Form())
        more = " or a list" if form.listed else " or a number" if form.amount else ""
        return kind_of(parts[0]) + more + (f" or {form.also.partition(':')[2]}" if form.also else "")
    if origin in (UnionType, typing.Union):
        kinds = [kind_of(one, given=given) for one in parts if one is not str or Path not in parts]
        return " or ".join(dict.fromkeys(kinds))
    if origin is typing.Literal:
        return " or ".join(f'`"{one}"`' for one in parts)
    if annotation is Path and given:
        return "str or Path"
    if origin is not None:
        return re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", str(annotation))
    return "None" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))


def default_of(default: Any) -> str:
    """A default value as Python writes it."""
    missing = (inspect.Parameter.empty, dataclasses.MISSING)
    return "" if default in missing or isinstance(default, list | dict) else f"`{default!r}`"


def text_of(parsed: Docstring, name: str) -> str:
    """What a docstring says of a parameter or an attribute; one line may be about several."""
    for one in parsed.meta:
        if isinstance(one, DocstringParam) and name in (part.strip("* ") for part in one.arg_name.split(",")):
            return cell(one.description or "")
    return ""


def told(record: type, name: str) -> str:
    """What the docstring of a record, or of one that it extends, says of an attribute."""
    texts = (text_of(docstring_parser.parse(inspect.getdoc(one) or ""), name) for one in record.__mro__[:-1])
    return next((text for text in texts if text), "")


def raises(parsed: Docstring) -> list[str]:
    """What a function raises, and when."""
    rows = [(f"`{one.type_name}`", cell(one.description or "")) for one in parsed.raises]
    return table(("raises", "when"), rows)


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """A table, or nothing where it has no rows."""
    shown = [f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows]
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *shown, ""] if shown else []


def cell(text: str) -> str:
    """A text in a cell of a table."""
    return " ".join(text.replace("|", "\\|").split())


def first_sentence(text: str) -> str:
    """The first paragraph of a docstring."""
    return text.split("\n\n")[0]


def source_of(one: Any) -> str:
    """The file that defines it, from the root of the repository."""
    return Path(inspect.getsourcefile(inspect.unwrap(one)) or "").resolve().relative_to(ROOT).as_posix()
