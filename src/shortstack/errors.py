"""The one error that shortstack raises for anything a user can cause."""

from __future__ import annotations

from collections.abc import Iterable

_MANY = 30  # names; so many are not listed in a hint


class ShortstackError(Exception):
    """What is wrong, where, and what to do next.

    The command line prints it on one or two lines (`error: ...`, `hint: ...`) and exits 1. `message` names the place,
    what was found and what was expected; `hint` is the next step.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


def did_you_mean(asked: str, known: Iterable[str], *, otherwise: str | None = None) -> str:
    """The hint for a name that does not exist: the nearest that does, or all of them (or `otherwise`); of many, three."""
    import difflib

    listed = list(known)
    near = difflib.get_close_matches(asked, listed, n=1)
    if near:
        return f"did you mean {near[0]}?"
    if len(listed) > _MANY and otherwise is None:
        holding = [name for name in listed if asked.lower() in name.lower()]
        first, second, third = [*holding, *difflib.get_close_matches(asked, listed, n=3, cutoff=0.0)][:3]
        return f"the nearest of {len(listed)} are {first}, {second} and {third}"
    return f"known: {', '.join(listed)}" if otherwise is None else otherwise


def first_line(error: BaseException) -> str:
    """What another library's error says, on one line: its first; its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def system_reason(error: Exception) -> str:
    """What the system refused, such as `no space left on device`; what any other error states."""
    if not isinstance(error, OSError):
        return str(error)
    return (error.strerror or str(error) or type(error).__name__).lower()


NO_WINDOWS = ("shortstack runs on Linux and macOS, not on Windows itself", "run it in WSL 2")  # message, hint


class UsageError(ShortstackError):
    """Wrong usage: options that contradict one another, a missing extra. The command line exits 2."""
