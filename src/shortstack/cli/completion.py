"""Completion in a shell: the script that completes commands, options and choices, printed or installed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from shortstack.common.shown import Shown
from shortstack.errors import ShortstackError, UsageError, system_reason

if TYPE_CHECKING:
    from cyclopts import App

Shell = Literal["bash", "zsh", "fish"]


@dataclass(frozen=True, repr=False)
class Completion(Shown):
    """A script for a shell.

    Attributes:
        shell: whose it is.
        script: its text.
        path: where it was installed; None where it is printed.
    """

    shell: Shell
    script: str
    path: Path | None

    def to_text(self) -> str:
        """The script, or where it is and what makes it work."""
        if self.path is None:
            return self.script
        return f"{self.path}: written; a new {self.shell} completes shortstack"

    def to_json(self) -> Any:
        """The JSON form."""
        return {"shell": self.shell, "script": self.script, "path": None if self.path is None else str(self.path)}


def completion(program: App, shell: Shell | None, install: bool) -> Completion:
    """The script for a shell, which is written to where that shell looks for it if it is to be installed.

    Args:
        program: the commands as the command line library knows them.
        shell: by default the one that the environment variable SHELL names.
        install: write it; the start-up file of bash and zsh gets a line that reads it.

    Raises:
        ShortstackError: the shell is not known, or the files cannot be written.
    """
    named = Path(os.environ.get("SHELL", "")).name
    chosen = shell or next((one for one in get_args(Shell) if one == named), None)
    if chosen is None:
        found = f"SHELL is {named!r}" if named else "SHELL is not set"
        raise UsageError(f"completion: the shell is not known: {found}", hint=f"name it: {', '.join(get_args(Shell))}")
    script = program.generate_completion(shell=chosen)
    if not install:
        return Completion(chosen, script, None)
    try:
        return Completion(chosen, script, program.install_completion(shell=chosen))
    except OSError as error:
        where = error.filename or "the completion script"
        raise ShortstackError(
            f"{where}: cannot be written ({system_reason(error)})", hint=f"shortstack completion {chosen} > FILE"
        ) from None
