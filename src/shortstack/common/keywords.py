"""Errors in the words of Python callers: `seq_len=128` where the command line reads `--seq-len 128`."""

from __future__ import annotations

import contextlib
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from shortstack.errors import ShortstackError

if TYPE_CHECKING:
    from shortstack.common.options import Option

# A command line as a whole stays as it is; so does an option that this function does not have.
_COMMAND = r"(?P<command>\bshortstack(?: [a-z]+)+ [^;,(]*)"
_VALUE = r"""'[^']*'|"[^"]*"|\d(?:[\w.,%-]*\w)?|[^\s,;:()]+"""
_OPTION = re.compile(rf"{_COMMAND}|--(?P<option>[a-z0-9]+(?:-[a-z0-9]+)*)(?:[ =](?P<value>{_VALUE}))?")


@contextlib.contextmanager
def errors_in_python(options: Mapping[str, Option], given: Mapping[str, Any]) -> Iterator[None]:
    """Within, errors name options as keywords.

    Args:
        options: of the function that is called, by name.
        given: the keywords that it is called with.
    """
    try:
        yield
    except ShortstackError as error:
        error.message = in_python(error.message, options, given)
        error.hint = in_python(error.hint, options, given)
        error.args = (error.message,)
        raise


def in_python(text: str, options: Mapping[str, Option], given: Mapping[str, Any]) -> str:
    """A text with options of the command line as keywords."""
    names = {name.strip("_").replace("_", "-"): name for name in options}

    def spoken(match: re.Match[str]) -> str:
        if match["command"]:
            return match[0]
        dashed, value = match["option"], match["value"]
        off = dashed.removeprefix("no-")
        name = names.get(dashed) or names.get(off)
        if name is None:
            return match[0]
        after = match[0][len(f"--{dashed}") :]
        kinds = _kinds(options[name].annotation)
        if bool in kinds:
            return f"{name}={dashed in names}{after}"
        is_last = match.end() == len(text)
        if value is None or not (is_last or _is_value(value, kinds, given.get(name))):
            return name + after
        return f"{name}={_literal(value, kinds)}"

    return _OPTION.sub(spoken, text)


def _kinds(annotation: Any) -> list[Any]:
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    kinds = [kind for kind in (typing.get_args(annotation) if union else (annotation,)) if kind is not type(None)]
    return [
        one
        for kind in kinds
        for one in (typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else (kind,))
    ]


def _is_value(token: str, kinds: list[Any], given: Any) -> bool:
    """Whether what follows an option is its value, not the next word of a sentence."""
    return token in kinds or token == str(given) or bool(re.match(r"['\"\d]|-\d|[A-Z_0-9]+$|.*[/.]\w", token))


def _literal(token: str, kinds: list[Any]) -> str:
    is_number = (int in kinds or float in kinds) and re.fullmatch(r"-?[\d.]+(?:e-?\d+)?", token)
    placeholder = re.fullmatch(r"[A-Z_]+", token)
    return token if is_number or placeholder or token[0] in "'\"" else repr(token)
