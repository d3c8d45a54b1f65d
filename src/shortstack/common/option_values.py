"""Values of options as Python callers give them: brought into the form that stages take, or refused by name."""

from __future__ import annotations

import dataclasses
import numbers
import operator
import os
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from shortstack.errors import UsageError, did_you_mean


@dataclass(frozen=True)
class Form:
    """What an option takes in Python besides its type.

    Attributes:
        listed: several values, which are a text with commas on the command line.
        amount: a number, which is a text with a unit on the command line.
        also: objects of this class (module:name), in the place of the file that holds one.
    """

    listed: bool = False
    amount: bool = False
    also: str = ""


_PLAIN = Form()
# Annotations of options. Type checkers see text; what else Python callers may give is made text before a stage sees it.
Listed = Annotated[str, Form(listed=True)]
Amount = Annotated[str, Form(amount=True)]

_WORDS = {int: ("a whole number",), float: ("a number",), bool: ("True", "False"), str: ("text",), Path: ("a path",)}
_NO = object()  # a value that does not fit


def fitted(name: str, annotation: Any, value: Any) -> Any:
    """The value in the form that a stage takes.

    Args:
        name: of the option.
        annotation: its type, with the `Form` that may be in it.
        value: as it was given.

    Raises:
        UsageError: it does not fit; with what was expected.
    """
    kinds = list(_alternatives(annotation))
    for kind, form in kinds:
        found = _as(kind, form, value)
        if found is not _NO:
            return found
    choices = [
        choice for kind, _ in kinds if typing.get_origin(kind) is typing.Literal for choice in typing.get_args(kind)
    ]
    hint = did_you_mean(value, choices, otherwise="") if isinstance(value, str) and choices else ""
    for record in (kind for kind, _ in kinds if dataclasses.is_dataclass(kind)):
        hint = f"or its fields as keywords: {', '.join(field.name for field in dataclasses.fields(record))}"
    raise UsageError(f"{name}={_shown(value)}: expected {_expected(kinds)}", hint=hint)


def expected_of(annotation: Any) -> str:
    """What an option of this type takes on the command line, in words."""
    return _expected(one for one in _alternatives(annotation) if one[0] is not type(None)).replace("'", "")


def _alternatives(annotation: Any, form: Form = _PLAIN) -> Iterable[tuple[Any, Form]]:
    if typing.get_origin(annotation) is Annotated:
        form = next((one for one in annotation.__metadata__ if isinstance(one, Form)), form)
        yield from _alternatives(annotation.__origin__, form)
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for one in typing.get_args(annotation):
            yield from _alternatives(one, form)
    else:
        yield annotation, form


def _as(kind: Any, form: Form, value: Any) -> Any:
    """The value as one of a type's alternatives, or `_NO`."""
    if form.also and _is_a(value, form.also):
        return value
    if kind in (None, type(None)):
        return None if value is None else _NO
    if typing.get_origin(kind) is typing.Literal:
        value = _named(value)
        return value if isinstance(value, str) and value in typing.get_args(kind) else _NO
    if kind in _READERS:
        return _READERS[kind](value, form)
    if typing.get_args(kind) == (str,):  # several texts
        found = [value] if isinstance(value, str) else value
        several = isinstance(found, (list, tuple)) and all(isinstance(one, str) for one in found)
        return tuple(found) if several else _NO
    return value if kind is Any or isinstance(value, kind) else _NO


def _as_bool(value: Any, _: Form) -> Any:
    return value if isinstance(value, bool) else _NO


def _as_int(value: Any, _: Form) -> Any:
    try:
        return _NO if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return _NO


def _as_float(value: Any, _: Form) -> Any:
    if isinstance(value, (bool, int, float)):
        return _NO if isinstance(value, bool) else value
    return float(value) if isinstance(value, numbers.Real) else _NO


def _as_path(value: Any, _: Form) -> Any:
    return Path(value) if isinstance(value, (str, os.PathLike)) else _NO


def _as_text(value: Any, form: Form) -> Any:
    value = _named(value)
    if isinstance(value, str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if form.amount and (found := _as_float(value, form)) is not _NO:
        return str(int(found)) if found == found // 1 else f"{found:f}"
    if not form.listed:
        return _NO
    if (found := _as_int(value, form)) is not _NO:
        return str(found)
    if isinstance(value, (bytes, Mapping)) or not isinstance(value, Iterable):
        return _NO
    parts = [_as_text(one, form) for one in value]
    return ",".join(parts) if parts and not any(one is _NO for one in parts) else _NO


_READERS = {bool: _as_bool, int: _as_int, float: _as_float, Path: _as_path, str: _as_text}


def _named(value: Any) -> Any:
    """A torch.dtype or torch.device by its name."""
    kind = type(value)
    return (
        str(value).removeprefix("torch.")
        if kind.__module__ == "torch" and kind.__name__ in ("dtype", "device")
        else value
    )


def _is_a(value: Any, where: str) -> bool:
    return any(f"{kind.__module__}:{kind.__qualname__}" == where for kind in type(value).__mro__)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _expected(kinds: Iterable[tuple[Any, Form]]) -> str:
    words: list[str] = []
    for kind, form in kinds:
        if typing.get_origin(kind) is typing.Literal:
            words += [repr(choice) for choice in typing.get_args(kind)]
        elif kind in (None, type(None)):
            words.append("None")
        else:
            words += _WORDS.get(kind, ("a list of texts" if typing.get_args(kind) else getattr(kind, "__name__", ""),))
        words += ["a list"] * form.listed + ["a number"] * form.amount
        words += [f"{form.also.partition(':')[2]}"] if form.also else []
    words = list(dict.fromkeys(words))
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
