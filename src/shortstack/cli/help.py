"""Help on the terminal: plain text at the width of the terminal, made of the registry alone, so that it is there at once."""

from __future__ import annotations

import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from shortstack.common.formatting import terminal_width, wrapped
from shortstack.common.options import Option
from shortstack.errors import UsageError, did_you_mean
from shortstack.registry import COMMANDS, GROUPS, Command

ABOUT = "Remove Transformer blocks from language models: measure which matter least, remove them, retrain, and compare."
# What every command takes, and what is no command of the registry: with their help.
EVERYWHERE = {
    "--json": "Print the result as JSON.",
    "--verbose": "Show on stderr how long each phase takes, which files are read and written, and messages of libraries.",
    "--debug": "Show the traceback of an error.",
    "--help": "Show this help.",
}
BESIDE = {
    "help": "Show the help of a command, such as `shortstack help score`.",
    "completion": "Print or install the shell completion of commands, options and their choices.",
}
# Options of most commands: they stand last, whatever record they are in.
_GENERAL = ("force", "trust_remote_code", "allow_links", "quiet")
_WIDEST = 100  # columns: longer lines are harder to read
_NAMES = 22  # columns that names of options take; a longer one has a line of its own
_KINDS = {int: "N", float: "X", Path: "PATH", str: "TEXT", bool: ""}


def requested_help(argv: list[str]) -> str | None:
    """The help that a command line requests; None where it requests none.

    Raises:
        UsageError: of a command that does not exist.
    """
    asks = {"--help", "-h"} & set(argv[: argv.index("--")] if "--" in argv else argv)
    words = [word for word in argv if not word.startswith("-")]
    if argv[:1] == ["help"] and not (asks and len(words) == 1):
        return help_of(words[1:])
    if asks:
        return help_of(words)
    is_bare = argv in ([], *([group] for group in GROUPS))
    return help_of(argv) if is_bare else None


def help_of(words: list[str]) -> str:
    """The help of the command that these words begin with; of all commands without words.

    Raises:
        UsageError: there is no such command.
    """
    two, one = " ".join(words[:2]), " ".join(words[:1])
    if not words:
        return overview()
    if two in COMMANDS or one in COMMANDS:
        return command_help(COMMANDS[two] if two in COMMANDS else COMMANDS[one])
    if one in GROUPS and len(words) == 1:
        return group_help(one)
    if one in BESIDE:
        return _beside_help(one)
    inside = [name.partition(" ")[2] for name in COMMANDS if name.startswith(f"{one} ")]
    wrong, known = (words[1], inside) if inside else (one, [*_top(), *BESIDE])
    raise UsageError(f'unknown command "{wrong}"', hint=did_you_mean(wrong, known, otherwise="shortstack help"))


def _beside_help(name: str) -> str:
    """The help of what is no command of the registry."""
    if name == "help":
        return _sections("Usage: shortstack help [COMMAND]", _filled(BESIDE[name]))
    return _sections(
        "Usage: shortstack completion [bash|zsh|fish] [--install]",
        _filled(BESIDE[name]),
        'Examples:\n  eval "$(shortstack completion bash)"    # in this shell alone\n  shortstack completion --install',
        _section(
            "Options",
            [
                ("bash|zsh|fish", "The shell. By default it is the one that the environment variable SHELL names."),
                ("--install", "Write the script to where the shell looks for it. What bash or zsh reads when it starts "
                 "gets a line that reads the script."),
            ],
        ),
    )  # fmt: skip


def overview() -> str:
    """All commands, in the order of the work."""
    last = [("--version", "Show the version."), *EVERYWHERE.items()]
    return _sections(
        "Usage: shortstack COMMAND [OPTIONS]",
        _filled(ABOUT),
        _section("Commands", [*_top().items(), *BESIDE.items()]),
        _section("Options of every command", last),
        _filled(
            "Begin with `shortstack quickstart` (about a minute); `shortstack help COMMAND` shows the options of a command, "
            "and an example."
        ),
    )


def group_help(group: str) -> str:
    """The commands that begin with this word, each with its example."""
    commands = {name.partition(" ")[2]: row for name, row in COMMANDS.items() if name.startswith(f"{group} ")}
    return _sections(
        f"Usage: shortstack {group} COMMAND [OPTIONS]",
        _filled(GROUPS[group]),
        _section("Commands", [(name, row.summary) for name, row in commands.items()]),
        "Examples:\n" + "\n".join(shell_lines(row.example) for row in commands.values()),
    )


def command_help(command: Command) -> str:
    """One command: its usage, an example, and its options, those of a kind together."""
    description = inspect.getdoc(command.stage) or ""
    description = description.partition("\n\nArgs:")[0].partition("\n\nReturns:")[0]
    sections = {
        heading: [(option_name(one), _with_default(one, command.options)) for one in options]
        for heading, options in grouped(command)
    }
    general = sections.pop("General options", [])
    return _sections(
        usage_line(command),
        *map(_filled, description.split("\n\n")),
        "Example:\n" + shell_lines(command.example),
        *(_section(heading, pairs) for heading, pairs in sections.items()),
        _section("General options", [*general, *EVERYWHERE.items()]),
    )


def grouped(command: Command) -> list[tuple[str, list[Option]]]:
    """The options of a command under their headings: its own first, then record by record, those of most commands last."""
    found: dict[str, list[Option]] = {"Arguments": [], "Options": []}
    last: list[Option] = []
    for option in command.options.values():
        if option.name in _GENERAL:
            last.append(option)
        elif option.positional:
            found["Arguments"].append(option)
        else:
            found.setdefault(option.heading or "Options", []).append(option)
    return [(heading, options) for heading, options in [*found.items(), ("General options", last)] if options]


def usage_line(command: Command) -> str:
    """How it is called: what is given by position, the options that it needs, and that there are others."""
    words = ["Usage:", "shortstack", command.name]
    for option in command.options.values():
        word = option.name.strip("_").upper()
        if option.many:
            words.append(f"{word}...")
        elif option.positional:
            words.append(word if option.is_required else f"[{word}]")
        elif option.is_required:
            words.append(f"{option.dashed} {word}")
    return " ".join([*words, "[OPTIONS]"])


def option_name(option: Option) -> str:
    """An option as it is typed, with the kind of its value."""
    name = option.dashed
    if option.positional:
        return name[2:].replace("-", "_").upper() + ("..." if option.many else "")
    kinds = list(_kinds(option.annotation))
    if bool in kinds:
        return name if option.default is False else f"{name}, --no-{name[2:]}"
    words = [_KINDS[kind] for kind in kinds if kind in _KINDS] + (["CHOICE"] if _choices(option) else [])
    return f"{name} {'|'.join(dict.fromkeys(words or ['TEXT']))}"


def help_text(option: Option, options: Mapping[str, Option]) -> str:
    """The help of an option, with the choices that it does not name itself.

    Args:
        option: of the command.
        options: all of the command, which the text may name.
    """
    choices = _choices(option)
    unnamed = not all(f"`{choice}`" in option.help for choice in choices)
    return typed(option.help, options) + (f" One of {', '.join(choices)}." if unnamed else "")


def shown_default(option: Option) -> str:
    """What an option is where it is not given; "" where that says nothing."""
    value = option.default
    if value in (None, False, (), "", inspect.Parameter.empty):
        return ""
    return "on" if value is True else f"{value:g}" if isinstance(value, float) else str(value)


def typed(text: str, options: Mapping[str, Option]) -> str:
    """A text that names options as Python does, `out` or `merge=False`, with the options as they are typed.

    Args:
        text: of a docstring.
        options: those of the command.
    """

    def dashed(match: re.Match[str]) -> str:
        name, value = match["name"], match["value"]
        if name not in options:
            return match[0]
        option = options[name].dashed
        if value in ("False", "True"):
            return option if value == "True" else f"--no-{option[2:]}"
        return option if value is None else f"{option} {value.strip(chr(39))}"

    return re.sub(r"`(?P<name>\w+)(?:=(?P<value>[^`]+))?`", dashed, text)


def shell_lines(example: str) -> str:
    """A command that can be copied: where it is too long, over several lines as a shell takes them."""
    together = re.sub(r"(--[a-z-]+) (?!--)", "\\1\N{NO-BREAK SPACE}", example)  # an option and its value
    lines = textwrap.wrap(
        together, _width() - 4, initial_indent="  ", subsequent_indent="      ", break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
    return " \\\n".join(lines).replace("\N{NO-BREAK SPACE}", " ")


def _top() -> dict[str, str]:
    """The first words of commands, with a line each."""
    return {
        name.partition(" ")[0]: GROUPS.get(name.partition(" ")[0], command.summary)
        for name, command in COMMANDS.items()
    }


def _kinds(annotation: Any) -> Iterator[Any]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for one in typing.get_args(annotation):
            yield from _kinds(one)
    elif annotation is not type(None):
        yield annotation


def _choices(option: Option) -> list[str]:
    literals = [kind for kind in _kinds(option.annotation) if typing.get_origin(kind) is typing.Literal]
    return [choice for kind in literals for choice in typing.get_args(kind)]


def _with_default(option: Option, options: Mapping[str, Option]) -> str:
    text, default = help_text(option, options), shown_default(option)
    if option.is_required and not option.positional:
        return f"Required. {text}"
    return f"{text} Default: {default}." if default else text


def _sections(usage: str, *sections: str) -> str:
    return "\n\n".join([_filled(usage, 7), *sections])


def _filled(text: str, indent: int = 0) -> str:
    lines = textwrap.wrap(
        text, _width(), subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines)


def _section(heading: str, pairs: Iterable[tuple[str, str]]) -> str:
    return f"{heading}:\n{wrapped(pairs, indent=2, most=_NAMES, width=_width())}"


def _width() -> int:
    return min(_WIDEST, terminal_width())
