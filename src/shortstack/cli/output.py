"""Standard output and standard error that may be closed, full, or of another encoding: one line, never a traceback."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from shortstack.errors import ShortstackError, system_reason


class OutputError(ShortstackError):
    """Standard output takes nothing more."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"the output cannot be written: {reason}",
            hint="files named by --out are complete; send the output elsewhere",
        )


@contextlib.contextmanager
def checked_stdout() -> Iterator[None]:
    """Within, what cannot be written to standard output raises an error of its own, and all of it is written at the end.

    Raises:
        OutputError: it is closed, or the system refuses to write.
        BrokenPipeError: who reads it has gone.
    """
    real = sys.stdout
    if real is None:
        raise OutputError("standard output is closed")
    checked = _Checked(real)
    try:
        with contextlib.redirect_stdout(checked):
            yield
            checked.flush()
    except (OutputError, BrokenPipeError):
        # What is still in the buffer has nowhere to go; Python would try again when it ends.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), real.fileno())
        raise


class _Checked:
    """A stream whose failures are told apart from those of a command."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write; characters that the stream's encoding lacks become question marks."""
        with _explained():
            try:
                return int(self._stream.write(text))
            except UnicodeEncodeError:
                encoding = self._stream.encoding or "ascii"
                return int(self._stream.write(text.encode(encoding, "replace").decode(encoding)))

    def flush(self) -> None:
        """Write what is in the buffer."""
        with _explained():
            self._stream.flush()


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(system_reason(error)) from None
    except ValueError as error:  # a file object that was closed
        raise OutputError(str(error).lower()) from None
