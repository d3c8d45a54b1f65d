"""Programs of others: found, called with a time limit and an environment of their own, and never trusted to end well."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from shortstack.benchmark.engines import EngineError
from shortstack.benchmark.utilisation import Sampler, session_rss_bytes
from shortstack.common.formatting import seconds
from shortstack.errors import UsageError, system_reason

# Of this process's environment, what an engine gets: nothing that points into our own Python, no tokens, no proxies.
_PASSED_ON = {
    "PATH", "HOME", "USER", "LOGNAME", "LANG", "TMPDIR", "TEMP", "TZ", "SHELL", "TERM", "LD_LIBRARY_PATH",
    "DYLD_LIBRARY_PATH", "CUDA_HOME", "CUDA_PATH", "XDG_CACHE_HOME",
}  # fmt: skip
_PASSED_ON_PREFIXES = (
    "LC_", "CUDA_", "NVIDIA_", "HIP_", "ROCR_", "OMP_", "MKL_", "KMP_", "GOMP_", "VLLM_", "GGML_", "LLAMA_",
)  # fmt: skip
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
_KEPT_LINES, _LINE = 20, 300  # of what a program says, for errors
_LOG_LINES = 400  # of a process that says more before it ends than why, such as vLLM's


def found_program(option: Path | None, names: Sequence[str], what: str, hint: str) -> Path:
    """A program by an option (itself, or the folder it is in), else on PATH.

    Args:
        option: what the user gave.
        names: what it may be called.
        what: the engine, for errors.
        hint: how it is got.

    Raises:
        UsageError: it is not there.
    """
    if option is not None:
        option = Path(option).expanduser()
        tried = [option / name for name in names] if option.is_dir() else [option]
        for path in tried:
            if path.is_file() and os.access(path, os.X_OK):
                return path.absolute()  # not resolved: a Python of a virtual environment is a link
        raise UsageError(f"{option}: no program of {what} is there ({' or '.join(names)})", hint=hint)
    for name in names:
        path_of = shutil.which(name)
        if path_of is not None:
            return Path(path_of)
    raise UsageError(f"{what} was not found: no {' or '.join(names)} on PATH", hint=hint)


def environment(**more: str) -> dict[str, str]:
    """What an engine's process is told: an allowed part of ours, offline, and `more`."""
    own = {
        name: value for name, value in os.environ.items() if name in _PASSED_ON or name.startswith(_PASSED_ON_PREFIXES)
    }
    return {**own, **_OFFLINE, **more}


@dataclass(frozen=True)
class Output:
    """What a program said before it ended well."""

    stdout: str
    stderr: str
    peak_rss_bytes: int | None = None  # of it and all that it started, as seen every half second


def run_program(
    arguments: Sequence[str | Path], *, what: str, limit: float, env: dict[str, str] | None = None
) -> Output:
    """Run a program to its end.

    Args:
        arguments: the program and what it is given; no shell sees them.
        what: what it is, for errors.
        limit: seconds; then it and all that it started are killed.
        env: its environment; by default `environment()`.

    Raises:
        EngineError: it could not be started, took longer, or did not end with 0; with its last message.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = _started(arguments, what, env, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        held = Sampler(lambda: {"rss_bytes": float(session_rss_bytes(process.pid) or 0)})
        try:
            with held:
                code = process.wait(limit)
        except subprocess.TimeoutExpired:
            raise EngineError(
                f"{what}: did not end within {seconds(limit)}{_said(_text(out), _text(err))}",
                hint="set a longer --time-limit",
            ) from None
        finally:
            _kill(process)
        if code:
            raise EngineError(f"{what}: {_ended(code)}{_said(_text(out), _text(err))}")
        peak = max((int(reading["rss_bytes"]) for reading in held.readings), default=0)
        return Output(_text(out), _text(err), peak or None)


class Conversation:
    """A process that answers lines of JSON with lines of JSON, each within a time limit.

    Only these lines are on its standard output; what else it says goes to its standard error, whose end errors quote.
    """

    def __init__(
        self, arguments: Sequence[str | Path], *, what: str, limit: float, env: dict[str, str] | None = None
    ) -> None:
        """Start it.

        Raises:
            EngineError: it could not be started.
        """
        self._what, self._limit, self._was_ended = what, limit, False
        pipe = subprocess.PIPE
        self._process = _started(arguments, what, env, stdin=pipe, stdout=pipe, stderr=pipe)
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._last: deque[str] = deque(maxlen=_LOG_LINES)
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._readers = [
            threading.Thread(target=self._read_answers, args=(self._process.stdout,), daemon=True),
            threading.Thread(target=self._read_log, args=(self._process.stderr,), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def tell(self, record: dict[str, Any]) -> None:
        """Send one record, and expect no answer yet.

        Raises:
            EngineError: it has ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write((json.dumps(record) + "\n").encode())
            self._process.stdin.flush()
        except (BrokenPipeError, OSError):
            raise self._over() from None

    def ask(self, record: dict[str, Any]) -> dict[str, Any]:
        """Send one record and wait for its answer."""
        self.tell(record)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next record that it sends.

        Raises:
            EngineError: none came in time, it ended, or it sent something else.
        """
        try:
            line = self._answers.get(timeout=self._limit)
        except queue.Empty:
            self.close()
            raise EngineError(
                f"{self._what}: no answer within {seconds(self._limit)}{self._quoted()}",
                hint="set a longer --time-limit",
            ) from None
        if line is None:
            raise self._over()
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            self.close()
            raise EngineError(f"{self._what}: expected a line of JSON, found {line.strip()[:80]!r}{self._quoted()}")
        if "error" in record:
            self.close()
            raise EngineError(f"{self._what}: {str(record['error'])[:_LINE]}")
        return record

    @property
    def log(self) -> str:
        """Its last message besides its answers."""
        return "\n".join(self._last)

    @property
    def exit_code(self) -> int | None:
        """The code that it ended with by itself, -N for signal N; None while it runs, and where it was ended from here."""
        return None if self._was_ended else self._process.poll()

    def close(self) -> None:
        """End it, and all that it started."""
        self._was_ended |= self._process.poll() is None
        _kill(self._process)
        for reader in self._readers:
            reader.join()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _over(self) -> EngineError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        code = self._process.poll()
        self.close()
        return EngineError(f"{self._what}: {_ended(code or 0)} before it answered{self._quoted()}")

    def _quoted(self) -> str:
        return _said("", "\n".join(self._last))

    def _read_answers(self, stream: IO[bytes]) -> None:
        for line in stream:
            self._answers.put(line.decode(errors="replace"))
        self._answers.put(None)

    def _read_log(self, stream: IO[bytes]) -> None:
        for line in stream:
            self._last.append(line.decode(errors="replace").rstrip())


@contextlib.contextmanager
def background(
    arguments: Sequence[str | Path], *, what: str, env: dict[str, str] | None = None
) -> Iterator[Background]:
    """Within, a program runs; afterwards it and all that it started have ended.

    Raises:
        EngineError: it could not be started.
    """
    with tempfile.TemporaryFile() as log:
        process = _started(arguments, what, env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield Background(process, what, log)
        finally:
            _kill(process)


@dataclass(frozen=True)
class Background:
    """A program that runs meanwhile."""

    process: subprocess.Popen[bytes]
    what: str
    log: IO[bytes]

    def error(self, message: str, hint: str = "") -> EngineError:
        """An error about it, with how it ended, if it did, and its last message."""
        code = self.process.poll()
        return EngineError(
            f"{self.what}: {message}{'' if code is None else f', it {_ended(code)}'}{_said('', _text(self.log))}",
            hint=hint,
        )


def _started(
    arguments: Sequence[str | Path], what: str, env: dict[str, str] | None, **streams: Any
) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            [str(part) for part in arguments],
            env=environment() if env is None else env,
            start_new_session=True,  # what it starts can be ended with it
            **streams,
        )
    except OSError as error:
        raise EngineError(f"{what}: {arguments[0]} cannot be started ({system_reason(error)})") from None


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and all of its session."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _text(stream: IO[bytes]) -> str:
    stream.seek(0)
    return stream.read().decode(errors="replace")


def _ended(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _said(out: str, err: str) -> str:
    """The last message of a program, for an error."""
    lines = [line.strip() for line in (err.strip() or out.strip()).splitlines() if line.strip()]
    if not lines:
        return "; it printed nothing"
    telling = [line for line in lines[-_KEPT_LINES:] if "error" in line.lower()]
    return f"; its last message: {(telling or lines)[-1][:_LINE]}"
