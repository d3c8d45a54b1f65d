"""Errors in the words of Python callers: `seq_len=128` where the command line reads `--seq-len 128`."""

from __future__ import annotations

import contextlib
import functools
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from shortstack.errors import ShortstackError

if TYPE_CHECKING:
    from shortstack.common.options import Option

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")

# A command line as a whole stays as it is, of this program or of another one.
_COMMAND = r"(?P<command>\b(?:(?:shortstack(?: [a-z]+)+|pip|hf|llama-[a-z]+) [^;,(]*|vllm --version))"
_VALUE = r"""'[^']*'|"[^"]*"|\d(?:[\w.,%-]*\w)?|[^\s,;:()]+"""
_OPTION = re.compile(rf"{_COMMAND}|--(?P<option>[a-z0-9]+(?:-[a-z0-9]+)*)(?:[ =](?P<value>{_VALUE}))?")

_typed = False  # of the process: errors of its threads are read by the same person


@contextlib.contextmanager
def as_typed() -> Iterator[None]:
    """Within, errors of records keep their options as they are typed: who translates them, if anybody, stands further out."""
    global _typed
    before, _typed = _typed, True
    try:
        yield
    finally:
        _typed = before


def is_typed() -> bool:
    """Whether errors keep their options as they are typed."""
    return _typed


def said_in_python(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """A function that Python callers call by themselves: its errors name options as keywords, but on the command line."""

    @functools.wraps(function)
    def called(*positional: _Given.args, **given: _Given.kwargs) -> _Result:
        values = {str(number): value for number, value in enumerate(positional)} | given
        with contextlib.nullcontext() if _typed else errors_in_python({}, values):
            return function(*positional, **given)

    return called


@contextlib.contextmanager
def errors_in_python(options: Mapping[str, Option], given: Mapping[str, Any]) -> Iterator[None]:
    """Within, errors name options as keywords; those of what is called further in are left to this one.

    Args:
        options: of the function that is called, by name.
        given: the keywords that it is called with.
    """
    try:
        with as_typed():
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
        name = names.get(dashed) or names.get(off) or off.replace("-", "_")
        after = match[0][len(f"--{dashed}") :]
        kinds = _kinds(options[name].annotation) if name in options else [int]  # of another function
        if bool in kinds or (name not in options and dashed != off):
            return f"{name}={dashed == off or dashed in names}{after}"
        is_last = name in options and match.end() == len(text)
        is_given = value in map(str, given.values()) if name not in options else value == str(given.get(name))
        if value is None or not (is_last or is_given or _is_value(value, kinds)):
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


def _is_value(token: str, kinds: list[Any]) -> bool:
    """Whether what follows an option looks like its value, not like the next word of a sentence."""
    return token in kinds or bool(re.match(r"['\"\d]|-\d|[A-Z_0-9]+$|.*[/.]\w", token))


def _literal(token: str, kinds: list[Any]) -> str:
    is_number = (int in kinds or float in kinds) and re.fullmatch(r"-?[\d.]+(?:e-?\d+)?", token)
    placeholder = re.fullmatch(r"[A-Z_]+", token)
    return token if is_number or placeholder or token[0] in "'\"" else repr(token)
