"""The command line: stage functions as commands, with the options that their signatures and docstrings define.

Commands are imported when they are run. A stage returns a result that knows its text and its JSON; this module prints
it, and turns errors into one or two lines and an exit code: 0 done, 1 a clear error, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from shortstack.cli.help import BESIDE, EVERYWHERE, requested_help
from shortstack.cli.output import checked_stdout
from shortstack.common.formatting import plain
from shortstack.common.keywords import as_typed
from shortstack.common.progress import say, silent
from shortstack.errors import ShortstackError, UsageError
from shortstack.registry import COMMANDS, GROUPS
from shortstack.runtime import cgroups
from shortstack.runtime.distributed import Process

if TYPE_CHECKING:
    from cyclopts import App


def run(argv: list[str]) -> int:
    """Run one command and return its exit code."""
    switches, words = _apart(argv)
    try:
        with checked_stdout(), as_typed():
            text = _version() if words == ["--version"] else requested_help(words)
            if text is not None:
                print(text)
                return 0
            return _run_command(words, switches)
    except (Exception, KeyboardInterrupt) as error:
        code = explained(error)
        if code is None or "--debug" in switches:
            raise
        return code


def _apart(argv: list[str]) -> tuple[set[str], list[str]]:
    """The switches that every command has, wherever they stand, and the other words."""
    end = argv.index("--") if "--" in argv else len(argv)
    switches = {word for word in argv[:end] if word in EVERYWHERE and word != "--help"}
    return switches, [word for number, word in enumerate(argv) if number >= end or word not in switches]


def _run_command(words: list[str], switches: set[str]) -> int:
    from cyclopts import CycloptsError

    from shortstack.cli.usage import usage_error
    from shortstack.cli.verbose import shown_work

    if "--verbose" not in switches:
        _quiet_libraries()
    _respect_processor_quota()
    try:
        with shown_work("--verbose" in switches), silent("--quiet" in words):
            result = command_line()(words, result_action="return_value", exit_on_error=False, print_error=False)
    except CycloptsError as error:
        raise usage_error(error) from None
    if result is not None and Process.from_environment().leads:  # of several processes one speaks
        _print_result(result, "--json" in switches)
    return int(getattr(result, "exit_code", 0))


def explained(error: BaseException) -> int | None:
    """Say on one or two lines what went wrong; the exit code, or None for what no user can cause."""
    if isinstance(error, KeyboardInterrupt):
        say("interrupted")
        return 130
    if isinstance(error, ShortstackError):
        say(plain("error: " + error.message))
        if error.hint:
            say(plain("hint: " + error.hint))
        return 2 if isinstance(error, UsageError) else 1
    if isinstance(error, BrokenPipeError):  # the reader of our output has gone, such as `| head`: nothing to say
        return 1
    if isinstance(error, MemoryError):
        say("error: out of memory\nhint: --memory streamed, fewer --samples, or a smaller --seq-len")
        return 1
    return None


def command_line(prefix: str = "") -> App:
    """The program: every command of the registry, and those that are about the command line itself.

    Args:
        prefix: before the names of the functions in `cli.commands`; "" to run them.
    """
    from cyclopts import App, Parameter

    app = App(
        name="shortstack",
        version=_version,
        help_format="plaintext",
        default_parameter=Parameter(negative_iterable=()),
        suppress_keyboard_interrupt=False,
    )
    groups = {name: App(name=name, help=line) for name, line in GROUPS.items()}
    for name, command in COMMANDS.items():
        parent, _, last = name.rpartition(" ")
        if parent and parent not in app:
            app.command(groups[parent])
        (groups[parent] if parent else app).command(
            f"shortstack.cli.commands:{prefix}{command.identifier}", name=last, help=command.summary
        )
    for name, line in BESIDE.items():
        app.command(f"shortstack.cli.commands:{name}_command", name=name, help=line)
    return app


def _version() -> str:
    import shortstack

    return str(shortstack.__version__)


def _print_result(result: Any, wants_json: bool) -> None:
    if wants_json:
        from shortstack.common.json_text import json_text

        print(json_text(result.to_json(), indent=1))
        return
    text = "\n".join(plain(line) for line in result.to_text().split("\n"))
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ and hasattr(result, "coloured"):
        text = result.coloured(text)
    print(text)


def _quiet_libraries() -> None:
    """Keep what libraries say (progress, advice) off the terminal, unless the user requested it."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # our own bars are switched on by name


def _respect_processor_quota() -> None:
    """torch counts the processors of the affinity; what a container's quota leaves of them must be said to it."""
    if cgroups.processors() < cgroups.allowed_processors():
        os.environ.setdefault("OMP_NUM_THREADS", str(cgroups.processors()))
