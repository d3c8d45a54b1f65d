"""The packages that retraining needs beyond the core, and what to install where one is missing."""

from __future__ import annotations

import importlib.util

from shortstack.errors import UsageError


def need_extra(verb: str, *packages: str) -> None:
    """Say at once, rather than after the work, that a package is missing.

    Raises:
        UsageError: one is not installed; with the command that installs it.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"{verb} needs {', '.join(missing)}", hint="pip install 'shortstack[retrain]'")
