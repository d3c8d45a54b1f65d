"""Packages beyond the core: which are missing, and what to install."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from shortstack.errors import UsageError


def missing_packages(names: Iterable[str]) -> list[str]:
    """Import names that are not installed."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def need_packages(what: str, *names: str, extra: str = "") -> None:
    """Say now, rather than after the work, that a package is missing.

    Args:
        what: a command or an option that needs them.
        names: their import names.
        extra: the extra of shortstack that installs them; without, they are installed by name.

    Raises:
        UsageError: one is not installed; with the command that installs it.
    """
    missing = missing_packages(names)
    if missing:
        install = f"'shortstack[{extra}]'" if extra else " ".join(names)
        raise UsageError(f"{what} needs {', '.join(missing)}", hint=f"pip install {install}")
