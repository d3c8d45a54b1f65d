"""Google docstrings: what each parameter or attribute means, and the text of a function whose records are flattened."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])

_ENTRY = re.compile(r"    (\*{0,2}[A-Za-z_][\w, *]*?)(?: \([^)]*\))?:(?:\s+(.*))?$")
_SECTIONS = ("Args:", "Attributes:")


def described(documented: Any) -> dict[str, str]:
    """Parameter or attribute -> its help, on one line; of a record that extends another, from both."""
    return {name: " ".join(" ".join(lines).split()) for name, lines in _entries(documented).items()}


def filled(**words: str) -> Callable[[_Function], _Function]:
    """Put words that a table knows into a docstring, in the place of `{name}`."""

    def fill(function: _Function) -> _Function:
        for name, text in words.items():
            function.__doc__ = (function.__doc__ or "").replace(f"{{{name}}}", text)
        return function

    return fill


def flattened_doc(function: Any, records: dict[str, tuple[type, list[str]]]) -> str | None:
    """The docstring of a function with the fields of its records in the place of each record.

    Args:
        function: with a docstring that has a line for each record.
        records: parameter -> the class of its record, and the names of the fields, in order.
    """
    documented = inspect.getdoc(function)
    if not documented or not records:
        return documented
    entries = _entries(function)
    for name, (record, fields) in records.items():
        texts = _entries(record)
        own = "\n".join(_written(name, entries[name])) if name in entries else ""
        of_fields = "\n".join(line for one in fields if one in texts for line in _written(one, texts[one]))
        article, values = "An" if record.__name__[0] in "AEIOU" else "A", f"`{fields[0]}` to `{fields[-1]}`"
        kind = f"    {name}: {article} `{record.__name__}` with the values of {values}. Keywords take precedence."
        if own and of_fields:
            documented = documented.replace(own, f"{of_fields}\n{kind}", 1)
    return documented


def _written(name: str, lines: list[str]) -> list[str]:
    first, *more = lines
    return [f"    {name}: {first}".rstrip(), *(f"        {line}" for line in more)]


def _entries(documented: Any) -> dict[str, list[str]]:
    """Name -> the lines of its help."""
    found: dict[str, list[str]] = {}
    for one in reversed(documented.__mro__[:-1]) if inspect.isclass(documented) else (documented,):
        section, name = False, ""
        for line in (inspect.getdoc(one) or "").split("\n") if one.__doc__ else ():
            if line and not line.startswith(" "):
                section, name = line in _SECTIONS, ""
            elif section and (match := _ENTRY.fullmatch(line)):
                name = match[1].lstrip("*")
                found[name] = [match[2] or ""]
            elif section and name and line.strip():
                found[name].append(line.strip())
    return found
