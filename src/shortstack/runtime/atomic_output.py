"""The write protocol, in one place: a directory or a file appears whole or not at all.

Refuse outputs that would harm the input, lock beside the output, write into a staging folder on the same file system,
flush, rename, flush the parent. What a killed process left is cleaned up by the next one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from shortstack.common.json_text import json_text
from shortstack.common.phases import phase
from shortstack.errors import ShortstackError, system_reason
from shortstack.runtime.hashes import RECORD_NAME, record_hashes

_SPARE_SPACE = 1.05
_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


@contextlib.contextmanager
def published(
    output: str | Path,
    *,
    inputs: Sequence[Path] = (),
    nbytes: int = 0,
    force: bool = False,
    is_locked: bool = False,
) -> Iterator[Path]:
    """Give a staging directory that becomes `output` when the body ends well, and vanishes when it does not.

    Its shortstack.json, where the body writes one, gets the sha256 of every file that it does not name yet.

    Args:
        output: the directory to make.
        inputs: directories that must not be touched: `output` may be none of them, nor lie inside one.
        nbytes: what will be written, to fail before the work rather than after it.
        force: replace an existing `output`, if shortstack made it.
        is_locked: the caller holds the output's lock already.

    Raises:
        ShortstackError: the output may not be written there, or another process is writing it.
    """
    target = absolute(output)
    with _staged(target, lambda: _refuse_unsafe(target, inputs, force), nbytes, is_locked=is_locked) as stage:
        yield stage
        _as_usual(stage)
        record_hashes(stage)
        sync_tree(stage)
        if os.path.lexists(target):
            _refuse_unsafe(target, (), force)  # it may have appeared meanwhile
        if target.exists():
            old = target.parent / f"{stage.name}-old"
            target.rename(old)
            _renamed(stage, target)
            shutil.rmtree(old)
        else:
            _renamed(stage, target)
        _sync(target.parent)


@contextlib.contextmanager
def _staged(target: Path, check: Callable[[], object], nbytes: int, *, is_locked: bool = False) -> Iterator[Path]:
    """A folder beside an output that `check` allows and this process alone may write; it is gone afterwards."""
    try:
        check()
        with contextlib.nullcontext() if is_locked else locked(target):
            _remove_stale(target)
            _check_space(target.parent, nbytes)
            stage = target.parent / f".{target.name}.shortstack-stage-{os.getpid()}"
            stage.mkdir()
            try:
                yield stage
            finally:
                shutil.rmtree(stage, ignore_errors=True)
    except OSError as error:
        raise _explained(target, error) from error


def absolute(output: str | Path) -> Path:
    """An output's path in full; links in it stay as they are."""
    return Path(os.path.abspath(Path(output).expanduser()))


def check_output(output: str | Path, *, inputs: Sequence[Path] = (), force: bool = False) -> None:
    """Fail now rather than after hours of work where `published` would refuse the output.

    Raises:
        ShortstackError: the output may not be written there.
    """
    target = absolute(output)
    _refuse_unsafe(target, inputs, force)
    check_writable_file(target.parent / f".{target.name}.shortstack-probe")


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Be the only shortstack process that writes `target`; the lock of a process that died is taken over.

    Raises:
        ShortstackError: another process holds the lock; says which and since when.
    """
    import filelock

    path = target.parent / f".{target.name}.shortstack.lock"
    lock = filelock.FileLock(path, timeout=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise ShortstackError(
            f"{target}: another shortstack process is writing it{_holder(path)}", hint="wait for it to end"
        ) from None
    except OSError as error:
        raise _explained(target, error) from error
    try:
        try:
            path.write_text(f"{os.getpid()} {socket.gethostname()} {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        except OSError as error:  # a disk that is full
            raise _explained(target, error) from error
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def _holder(lock: Path) -> str:
    with contextlib.suppress(OSError, ValueError):
        pid, host, since = lock.read_text().strip().split(" ", 2)
        return f" (process {pid} on {host}, since {since})"
    return ""


def _as_usual(folder: Path) -> None:
    """Give weights the rights that a new file has here: libraries that write by a temporary file leave 0600."""
    rights = folder.stat().st_mode & 0o666
    for path in folder.rglob("*.safetensors"):
        path.chmod(rights)


def _renamed(stage: Path, target: Path) -> None:
    """Rename a directory; on file systems that cannot, move its files, config.json, which loaders ask for, last."""
    try:
        stage.rename(target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        try:
            target.mkdir()
            files = sorted(path for path in stage.rglob("*") if path.is_file())
            for path in sorted(files, key=lambda path: path.name == "config.json"):
                place = target / path.relative_to(stage)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, place)
            sync_tree(target)
        except BaseException:
            shutil.rmtree(target, ignore_errors=True)
            raise


def _explained(target: Path, error: OSError) -> ShortstackError:
    """What the system refused, as an error that says what to do."""
    reason = system_reason(error)
    if error.errno in _FULL:
        return ShortstackError(
            f"{target}: could not be written ({reason}); no output was left",
            hint="free some disk space, then run the command again",
        )
    place = error.filename or target
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        return ShortstackError(f"{place}: no permission to write there ({reason})", hint="choose another --out")
    return ShortstackError(f"{place}: {reason}", hint="no output was written; choose another --out, or check the disk")


def write_file(path: Path, *data: bytes | memoryview) -> None:
    """Write one file, piece after piece, whole or not at all: beside its final place first. Parents are made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path)
        temporary = path.with_name(f".{path.name}.shortstack-stage-{os.getpid()}")
        try:
            with temporary.open("wb") as stream:
                for piece in data:
                    stream.write(piece)
                stream.flush()
                flush(stream.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ShortstackError(f"{path}: could not be written ({system_reason(error)})") from None


def write_json(path: Path, record: Any) -> None:
    """Write a record as JSON, whole or not at all."""
    write_file(path, (json_text(record, indent=1) + "\n").encode())


@contextlib.contextmanager
def published_file(
    output: str | Path, *, inputs: Sequence[Path] = (), nbytes: int = 0, force: bool = False
) -> Iterator[Path]:
    """Give the path of a file to write, which becomes `output` when the body ends well, and vanishes when it does not.

    It lies in a folder of its own: whatever else is written there goes with it.

    Args:
        output: the file to make.
        inputs: directories that must not be touched.
        nbytes: what will be written, to fail before the work rather than after it.
        force: replace an existing file.

    Raises:
        ShortstackError: the output may not be written there, or another process is writing it.
    """
    target = absolute(output)

    def check() -> None:
        check_new_file(target, inputs=inputs, force=force)

    with _staged(target, check, nbytes) as stage:
        made = stage / f"output{target.suffix}"
        yield made
        _sync(made)
        check()  # it may have appeared meanwhile
        made.replace(target)
        _sync(target.parent)


def check_new_file(output: str | Path, *, inputs: Sequence[Path] = (), force: bool = False) -> None:
    """Fail now where a file may not be made, or would replace another that was not to be replaced.

    Raises:
        ShortstackError: it lies inside an input, exists already, or cannot be written there.
    """
    target = absolute(output)
    _refuse_inputs(target, inputs)
    check_writable_file(target)
    if os.path.lexists(target) and not force:
        raise ShortstackError(f"{target}: exists already", hint="choose another --out, or --force to replace it")


def check_writable_file(path: Path) -> None:
    """Fail now rather than after the work when a file could not be written."""
    if path.is_dir():
        raise ShortstackError(f"{path}: is a directory, expected the name of a file to write")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ShortstackError(f"{path}: cannot be written there ({parent} is not a writable directory)")


def _refuse_inputs(target: Path, inputs: Sequence[Path]) -> None:
    """Refuse an output that is an input, or lies inside one or a hub cache."""
    real = Path(os.path.realpath(target))
    for source in inputs:
        real_source = Path(os.path.realpath(source))
        if real == real_source or real_source in real.parents:
            where = "is the input" if real == real_source else f"lies inside the input {source}"
            raise ShortstackError(f"{target}: {where}, which is never touched", hint="choose another --out")
    if "snapshots" in real.parts and any(part.startswith("models--") for part in real.parts):
        raise ShortstackError(f"{target}: is inside a hub cache", hint="choose another --out")


def _refuse_unsafe(target: Path, inputs: Sequence[Path], force: bool) -> None:
    _refuse_inputs(target, inputs)
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise ShortstackError(f"{target}: exists and is not a directory", hint="choose another --out")
    if not any(target.iterdir()):
        target.rmdir()
        return
    if not (target / RECORD_NAME).is_file():
        raise ShortstackError(
            f"{target}: exists already, not a checkpoint that shortstack made (no {RECORD_NAME}), so it is not replaced",
            hint="choose another --out, or remove it yourself",
        )
    if not force:
        raise ShortstackError(f"{target}: exists already", hint="choose another --out, or --force to replace it")


def _remove_stale(target: Path) -> None:
    """Clean up after processes that died; an output that one had moved away and not replaced comes back."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.shortstack-stage-(\d+)(-old)?")
    for path in sorted(target.parent.iterdir()):
        match = pattern.fullmatch(path.name)
        if match and not _alive(int(match.group(1))):
            if match.group(2) and not os.path.lexists(target):
                path.rename(target)
            elif path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # a stage of this number is a leftover: this process holds the lock and has not made one yet
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _check_space(folder: Path, nbytes: int) -> None:
    free = shutil.disk_usage(folder).free
    needed = int(nbytes * _SPARE_SPACE)
    if needed > free:
        raise ShortstackError(
            f"{folder}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free", hint="free some disk space first"
        )


@phase("writing to the disk")
def sync_tree(folder: Path) -> None:
    """Flush a folder and all that is in it."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() or path.is_dir():
            _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    """Flush a file or a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)


def flush(descriptor: int) -> None:
    """Flush an open file or directory to the disk; on macOS also out of the drive's own cache, where fsync leaves it."""
    if sys.platform == "darwin":
        import fcntl

        with contextlib.suppress(OSError):  # a file system that does not know the request
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)
