"""The commands as the command line library takes them: functions whose records of options are flattened into options.

A command is imported when it is run: `shortstack.cli.commands:retrain_lora` is looked up then.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

from cyclopts import Parameter

from shortstack.common.options import Option
from shortstack.registry import COMMANDS, Command


def __getattr__(name: str) -> Any:
    for command in COMMANDS.values():
        if command.identifier == name:
            return _flat(command)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _flat(command: Command) -> Callable[..., Any]:
    options = command.options
    many = next((name for name, option in options.items() if option.many), None)

    def run(*positional: Any, **given: Any) -> Any:
        values = dict(zip((name for name, option in options.items() if option.positional), positional, strict=False))
        return command.call({**({many: positional} if many else values), **given})

    annotations = {name: Annotated[option.annotation, _shown(option)] for name, option in options.items()}
    run.__signature__ = inspect.Signature([_parameter(option, annotations[option.name]) for option in options.values()])  # type: ignore[attr-defined]
    run.__annotations__ = annotations
    run.__name__ = command.identifier
    run.__doc__ = _description(command)
    return run


def _shown(option: Option) -> Parameter:
    """A switch that is off by default is turned on or left out: it has no `--no-...`."""
    return Parameter(help=option.help, negative="") if option.default is False else Parameter(help=option.help)


def _parameter(option: Option, annotation: Any) -> inspect.Parameter:
    if option.many:
        return inspect.Parameter(option.name, inspect.Parameter.VAR_POSITIONAL, annotation=annotation)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if option.positional else inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(option.name, kind, default=option.default, annotation=annotation)


def usage_line(command: Command) -> str:
    """How it is called: what is given by position, the options that it needs, and that there are others."""
    words = ["shortstack", command.name]
    for name, option in command.options.items():
        word = name.strip("_").upper()
        required = option.default is inspect.Parameter.empty
        if option.many:
            words.append(f"{word}...")
        elif option.positional:
            words.append(word if required else f"[{word}]")
        elif required:
            words.append(f"--{name.replace('_', '-')} {word}")
    return " ".join(["Usage:", *words, "[OPTIONS]"])


def _description(command: Command) -> str:
    """The docstring up to its sections."""
    return (inspect.getdoc(command.stage) or "").partition("\n\nArgs:")[0].partition("\n\nReturns:")[0]
