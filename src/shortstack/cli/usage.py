"""Wrong usage of the command line, as the command line library finds it, in the words of all other errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shortstack.errors import UsageError, did_you_mean
from shortstack.registry import COMMANDS

if TYPE_CHECKING:
    from cyclopts import CycloptsError


def usage_error(error: CycloptsError) -> UsageError:
    """What is wrong, and the nearest thing that exists.

    A mistyped option comes before an option that is missing: most often it is the same one.
    """
    from cyclopts.exceptions import MissingArgumentError, UnknownOptionError, UnusedCliTokensError

    command = " ".join(error.command_chain or ())
    help_line = f"shortstack {command} --help".replace("  ", " ")
    mistyped = None
    if isinstance(error, UnknownOptionError):
        mistyped = error.token.keyword or error.token.value
    elif isinstance(error, MissingArgumentError):
        given = [token.partition("=")[0] for token in error.unused_tokens or () if token.startswith("--")]
        known = {one for name in _options(command) for one in (name, name.replace("--", "--no-", 1))}
        mistyped = next((token for token in given if token not in known), None)
    if mistyped is not None:
        name = mistyped.partition("=")[0]
        return UsageError(f"unknown option: {name}", hint=did_you_mean(name, _options(command), otherwise=help_line))
    if isinstance(error, UnusedCliTokensError):
        return _unexpected(command, (error.unused_tokens or ["?"])[0])
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        name = error.keyword or error.argument.name
        positional = command in COMMANDS and COMMANDS[command].options[_identifier(name)].positional
        name = _identifier(name).upper() if positional else name
        what = f"{name} needs a value" if error.keyword else f"{name} is missing"
        return UsageError(f"{command}: {what}", hint=_example(command, name) or help_line)
    message, _, near = str(error).strip().partition(" Did you mean ")
    message = message.partition(" Available commands")[0].rstrip(".")
    message = message[:1].lower() + message[1:]
    nearest = near.partition("?")[0].strip('"')
    return UsageError(message, hint=f"did you mean {nearest}?" if near else help_line)


def _unexpected(command: str, token: str) -> UsageError:
    """An argument too many: most often the value of an option, such as `prune MODEL plan.json`."""
    options = COMMANDS[command].options if command in COMMANDS else {}
    taken = " ".join(name.upper() for name, option in options.items() if option.positional)
    meant = next((name for name, one in options.items() if not one.positional and len(name) > 2 and name in token), "")
    such = f"; did you mean --{meant.replace('_', '-')} {token}?" if meant else f" (shortstack {command} --help)"
    takes = f"{command} takes {f'{taken} alone' if taken else 'no argument'}" if command in COMMANDS else ""
    return UsageError(f"unexpected argument: {token}", hint=takes + such)


def _example(command: str, name: str) -> str:
    """What the example of a command gives for an argument."""
    words = COMMANDS[command].example.split() if command in COMMANDS else []
    if name in words[:-1] and name.startswith("--"):
        return f"such as {name} {words[words.index(name) + 1]}"
    return f"such as {COMMANDS[command].example}" if words else ""


def _identifier(name: str) -> str:
    return name.lstrip("-").lower().replace("-", "_")


def _options(command: str) -> list[str]:
    names = list(COMMANDS[command].options) if command in COMMANDS else []
    return ["--json", "--debug", "--help", *(f"--{name.replace('_', '-')}" for name in names)]
