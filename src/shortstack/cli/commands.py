"""The commands as the command line library takes them: functions whose records of options are flattened into options.

A command is imported when it is run: `shortstack.cli.commands:retrain_lora` is looked up then.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from shortstack.cli.completion import Shell, completion
from shortstack.cli.help import EVERYWHERE, typed
from shortstack.common.options import Option
from shortstack.registry import COMMANDS, Command

COMPLETED = "completed_"  # before the name of a command that is not to be run, but completed by a shell


def __getattr__(name: str) -> Any:
    for command in COMMANDS.values():
        if name in (command.identifier, f"{COMPLETED}{command.identifier}"):
            return _flat(command, is_completed=name != command.identifier)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _flat(command: Command, *, is_completed: bool = False) -> Callable[..., Any]:
    """A command as a function.

    Args:
        command: of the registry.
        is_completed: for a shell that completes it: with the switches of every command, which `cli.app` has taken away
            before a command runs, and with no value behind a switch that is neither on nor off by default.
    """
    options = command.options
    many = next((name for name, option in options.items() if option.many), None)

    def run(*positional: Any, **given: Any) -> Any:
        values = dict(zip((name for name, option in options.items() if option.positional), positional, strict=False))
        return command.call({**({many: positional} if many else values), **given})

    annotations = {}
    for name, option in options.items():
        kind = bool if is_completed and option.annotation == bool | None else option.annotation
        annotations[name] = Annotated[kind, _shown(option, typed(option.help, options))]
    parameters = [_parameter(option, annotations[option.name]) for option in options.values()]
    parameters += _switches() if is_completed else []
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    run.__name__ = command.identifier
    return run


def _switches() -> list[inspect.Parameter]:
    kind = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter(
            f"{name[2:]}_", kind, default=False, annotation=Annotated[bool, Parameter(name, negative="", help=text)]
        )
        for name, text in EVERYWHERE.items()
        if name != "--help"
    ]


def _shown(option: Option, help_text: str) -> Parameter:
    """A switch that is off by default is turned on or left out: it has no `--no-...`."""
    return Parameter(help=help_text, negative="") if option.default is False else Parameter(help=help_text)


def _parameter(option: Option, annotation: Any) -> inspect.Parameter:
    if option.many:
        return inspect.Parameter(option.name, inspect.Parameter.VAR_POSITIONAL, annotation=annotation)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if option.positional else inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(option.name, kind, default=option.default, annotation=annotation)


def help_command(*command: str) -> None:
    """Show the help of a command. `cli.help` does that before a command line is taken apart."""


# For a shell that completes: the words of commands.
help_command.__annotations__["command"] = Literal[
    tuple(dict.fromkeys(word for name in COMMANDS for word in name.split()))
]


def completion_command(shell: Shell | None = None, *, install: Annotated[bool, Parameter(negative="")] = False) -> Any:
    """Print or install the shell completion of commands, options and their choices.

    Args:
        shell: The shell; by default the one that the environment variable SHELL names.
        install: Write the script to where the shell looks for it, and read it from bash's or zsh's start-up file.
    """
    from shortstack.cli.app import command_line

    return completion(command_line(COMPLETED), shell, install)
