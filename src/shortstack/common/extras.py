"""The packages that parts of shortstack need beyond the core, and what to install where one is missing."""

from __future__ import annotations

import importlib.util

from shortstack.errors import UsageError

_RETRAIN, _EVAL = "'shortstack[retrain]'", "'shortstack[eval]'"
# Verb -> (the import names of what it needs, what to give to pip).
NEEDS: dict[str, tuple[tuple[str, ...], str]] = {
    "retrain lora": (("accelerate", "peft"), _RETRAIN),
    "retrain cpt": (("accelerate",), _RETRAIN),
    "retrain distill": (("accelerate",), _RETRAIN),
    "merge": (("peft",), _RETRAIN),
    "eval zeroshot": (("lm_eval",), _EVAL),
    "eval all": (("lm_eval",), _EVAL),
}


def missing_packages(verb: str, *further: str) -> tuple[list[str], str]:
    """(the packages that a verb needs and that are not installed, what to give to pip).

    Args:
        verb: what needs them.
        further: import names of what it needs besides, as it is used.
    """
    packages, install = NEEDS.get(verb, ((), " ".join(further)))
    return [name for name in (*packages, *further) if importlib.util.find_spec(name) is None], install


def need_extra(verb: str, *further: str) -> None:
    """Say at once, rather than after the work, that a package is missing.

    Args:
        verb: what needs it; an option, for packages that one option needs.
        further: import names of what it needs besides those that it always needs.

    Raises:
        UsageError: one is not installed; with the command that installs it.
    """
    missing, install = missing_packages(verb, *further)
    if missing:
        raise UsageError(f"{verb} needs {', '.join(missing)}", hint=f"pip install {install}")
