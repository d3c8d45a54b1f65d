"""The command line: stage functions as commands, with the options that their signatures and docstrings define.

Commands are imported when they are run. A stage returns a result that knows its text and its JSON; this module prints
it, and turns errors into one or two lines and an exit code: 0 done, 1 a clear error, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import Annotated, Any

from cyclopts import App, Group, Parameter

from shortstack.cli.output import checked_stdout
from shortstack.common.formatting import plain
from shortstack.common.progress import say
from shortstack.errors import ShortstackError, UsageError
from shortstack.registry import COMMANDS, GROUPS
from shortstack.runtime import cgroups
from shortstack.runtime.distributed import Process

_EVERYWHERE = Group("Options of every command", sort_key=10)


def run(argv: list[str]) -> int:
    """Run one command and return its exit code."""
    wants_json, debug = False, False
    app = command_line()
    app.meta.suppress_keyboard_interrupt = False
    _show_usage(app, argv)

    @app.meta.default
    def launch(
        *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        json: Annotated[bool, Parameter(negative="", group=_EVERYWHERE, help="print the result as JSON.")] = False,
        debug_: Annotated[
            bool, Parameter("--debug", negative="", group=_EVERYWHERE, help="show an error's traceback.")
        ] = False,
    ) -> Any:
        nonlocal wants_json, debug
        wants_json, debug = json, debug_
        return app(tokens, result_action="return_value", exit_on_error=False, print_error=False)

    from cyclopts import CycloptsError

    _quiet_libraries()
    _respect_processor_quota()
    try:
        with checked_stdout():
            result = app.meta(argv, result_action="return_value", exit_on_error=False, print_error=False)
            if result is not None and Process.from_environment().leads:  # of several processes one speaks
                _print_result(result, wants_json)
        return int(getattr(result, "exit_code", 0))
    except CycloptsError as error:
        from shortstack.cli.usage import usage_error

        explained(usage_error(error))
        return 2
    except (Exception, KeyboardInterrupt) as error:
        code = explained(error)
        if code is None or debug:
            raise
        return code


def _show_usage(app: App, argv: list[str]) -> None:
    """Where help is asked for, the usage of that command names what it takes."""
    if not {"--help", "-h"} & set(argv):
        return
    from shortstack.cli.commands import usage_line

    words = [word for word in argv if not word.startswith("-")]
    for name in (" ".join(words[:2]), *words[:1]):
        if name in COMMANDS:
            functools.reduce(lambda parent, part: parent[part], name.split(), app).usage = usage_line(COMMANDS[name])
            return


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


def command_line() -> App:
    """The program: every command of the registry."""
    app = App(
        name="shortstack",
        help="Make the stack of Transformer blocks of a language model shorter: measure, remove, and show what it cost.",
        help_epilogue="Example: shortstack quickstart (about a minute); shortstack COMMAND --help has one for each command.",
        version=_version,
        help_format="plaintext",
        default_parameter=Parameter(negative_iterable=(), show_default=_shown_default),
        suppress_keyboard_interrupt=False,
    )
    order = list(COMMANDS)  # that of the work
    groups = {
        name: App(
            name=name,
            help=line,
            help_epilogue="Examples:\n"
            + "\n".join(f"  {COMMANDS[one].example}" for one in order if one.startswith(f"{name} ")),
            sort_key=min(number for number, one in enumerate(order) if one.startswith(f"{name} ")),
        )
        for name, line in GROUPS.items()
    }
    for number, (name, command) in enumerate(COMMANDS.items()):
        parent, _, last = name.rpartition(" ")
        if parent and parent not in app:
            app.command(groups[parent])
        (groups[parent] if parent else app).command(
            f"shortstack.cli.commands:{command.identifier}",
            name=last,
            help=command.summary,
            help_epilogue=f"Example: {command.example}",
            sort_key=number,
        )
    return app


def _shown_default(value: Any) -> Any:
    """Defaults are shown where they say something: not for switches that are off."""
    return None if value is False or value == () else value


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
    """Keep what libraries say (progress, advice) off the terminal, unless the user asked for it."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # our own bars are asked for by name


def _respect_processor_quota() -> None:
    """torch counts the processors of the affinity; what a container's quota leaves of them must be said to it."""
    if cgroups.processors() < cgroups.allowed_processors():
        os.environ.setdefault("OMP_NUM_THREADS", str(cgroups.processors()))
