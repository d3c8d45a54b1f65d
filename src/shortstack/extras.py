"""The packages that parts of shortstack need beyond the core, and what to install where one is missing."""

from __future__ import annotations

import importlib.util

from shortstack.errors import UsageError


def need_extra(verb: str, *packages: str, install: str = "'shortstack[retrain]'") -> None:
    """Say at once, rather than after the work, that a package is missing.

    Args:
        verb: what needs them.
        packages: their import names.
        install: what to give to pip.

    Raises:
        UsageError: one is not installed; with the command that installs it.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"{verb} needs {', '.join(missing)}", hint=f"pip install {install}")
