"""Wrong usage of the command line, as the command line library finds it, in the words of all other errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shortstack.cli.help import EVERYWHERE, shown_default
from shortstack.common.option_values import expected_of
from shortstack.common.options import Option
from shortstack.errors import UsageError, did_you_mean
from shortstack.registry import COMMANDS

if TYPE_CHECKING:
    from cyclopts import CycloptsError


def usage_error(error: CycloptsError) -> UsageError:
    """What is wrong, and the nearest thing that exists.

    A mistyped option comes before an option that is missing: most often it is the same one.
    """
    from cyclopts.exceptions import CoercionError, MissingArgumentError, UnusedCliTokensError

    command = " ".join(error.command_chain or ())
    mistyped = _mistyped(error, command)
    if mistyped is not None:
        otherwise = f"shortstack {command} --help".replace("  ", " ")
        return UsageError(
            f"unknown option: {mistyped}", hint=did_you_mean(mistyped, _typed(command), otherwise=otherwise)
        )
    if isinstance(error, UnusedCliTokensError):
        return _unexpected(command, (error.unused_tokens or ["?"])[0])
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        return _missing(command, error.argument.name, needs_value=bool(error.keyword))
    if isinstance(error, CoercionError) and error.argument is not None and error.token is not None:
        option = _option(command, error.argument.name)
        if option is not None and "Choose from" not in str(error):
            name = option.name.upper() if option.positional else option.dashed
            return UsageError(f"{name} {error.token.value}: expected {expected_of(option.annotation)}")
    return _in_our_words(str(error).strip(), command)


def _mistyped(error: CycloptsError, command: str) -> str | None:
    """The option that does not exist, where that is what is wrong."""
    from cyclopts.exceptions import MissingArgumentError, UnknownCommandError, UnknownOptionError

    given: list[str] = []
    if isinstance(error, UnknownOptionError):
        given = [error.token.keyword or error.token.value]
    elif isinstance(error, UnknownCommandError):
        given = [token for token in (error.unused_tokens or ())[:1] if token.startswith("-")]
    elif isinstance(error, MissingArgumentError):
        known = {one for name in _typed(command) for one in (name, name.replace("--", "--no-", 1))}
        tokens = (token for token in error.unused_tokens or () if token.startswith("--"))
        given = [token for token in tokens if token.partition("=")[0] not in known]
    return given[0].partition("=")[0] if given else None


def _missing(command: str, name: str, *, needs_value: bool) -> UsageError:
    option = _option(command, name)
    if option is None:
        return UsageError(f"{command}: {name} is missing", hint=f"shortstack {command} --help")
    shown = option.name.strip("_").upper() if option.positional else option.dashed
    what = f"{shown} needs a value" if needs_value else f"{shown} is missing"
    return UsageError(f"{command}: {what}", hint=_example(command, option))


def _unexpected(command: str, token: str) -> UsageError:
    """An argument too many: most often the value of an option, such as `prune MODEL plan.json`."""
    options = COMMANDS[command].options if command in COMMANDS else {}
    taken = " ".join(name.upper() for name, option in options.items() if option.positional)
    meant = next((one for name, one in options.items() if not one.positional and len(name) > 2 and name in token), None)
    such = f"; did you mean {meant.dashed} {token}?" if meant else f" (shortstack {command} --help)"
    takes = f"{command} takes {f'{taken} alone' if taken else 'no argument'}" if command in COMMANDS else ""
    return UsageError(f"unexpected argument: {token}", hint=takes + such)


def _in_our_words(said: str, command: str) -> UsageError:
    """What the command line library says, as all other errors are said."""
    message, _, near = said.partition(" Did you mean ")
    message = message.partition(" Available commands")[0].rstrip(".")
    message = message[:1].lower() + message[1:]
    nearest = near.partition("?")[0].strip('"')
    inside = [name.partition(" ")[2] for name in COMMANDS if command and name.startswith(f"{command} ")]
    otherwise = f"known: {', '.join(inside)}" if inside else f"shortstack {command} --help".replace("  ", " ")
    return UsageError(message, hint=f"did you mean {nearest}?" if near else otherwise)


def _example(command: str, option: Option) -> str:
    """A value for an option: that of the command's example, or its default; else the whole example."""
    words = COMMANDS[command].example.split()
    if option.dashed in words[:-1]:
        return f"such as {option.dashed} {words[words.index(option.dashed) + 1]}"
    default = shown_default(option)
    return f"such as {option.dashed} {default}" if default else f"such as {COMMANDS[command].example}"


def _option(command: str, typed: str) -> Option | None:
    """The option that is typed so, `--seq-len` or MODEL."""
    options = COMMANDS[command].options.values() if command in COMMANDS else ()
    dashed = f"--{typed.lstrip('-').lower().replace('_', '-')}"
    return next((option for option in options if option.dashed == dashed), None)


def _typed(command: str) -> list[str]:
    """The options of a command, and those of every command, as they are typed."""
    beside = ["--version"] if command not in COMMANDS else []
    own = [option.dashed for option in COMMANDS[command].options.values()] if command in COMMANDS else []
    return [*EVERYWHERE, *beside, *own]
