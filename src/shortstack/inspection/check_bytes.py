"""The part of a check that reads every byte: values that are not finite, and the hashes that shortstack.json records.

A weight file is read once for both. What is not read is said: nothing else about it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, get_args

from shortstack.artifacts import provenance
from shortstack.artifacts.provenance import PLAN_FILE, RETRAINING_FILES
from shortstack.checkpoint.byte_copy import first_nonfinite, read_through, values_are_known
from shortstack.checkpoint.headers import TensorInfo
from shortstack.checkpoint.hub import is_not_downloaded
from shortstack.common.formatting import size
from shortstack.common.progress import Progress
from shortstack.errors import ShortstackError
from shortstack.inspection.findings import Findings
from shortstack.runtime.hashes import file_sha256

Standing = Literal["same", "changed", "missing", "large", "elsewhere"]
LARGE = 1 << 28  # bytes; --quick leaves such files alone


def check_bytes(
    findings: Findings,
    directory: Path,
    tensors: dict[str, TensorInfo],
    shards: Iterable[Path],
    *,
    quick: bool,
    progress: Progress,
) -> None:
    """Look for NaN and infinity, and compare every recorded hash.

    Args:
        findings: gets the lines.
        directory: the checkpoint.
        tensors, shards: as `read_weights` gives them.
        quick: leave files of 256 MB or more alone, and say so.
        progress: shows how much was read.
    """
    record = _record(findings, directory)
    recorded = record.get("files", {})
    hashes, broken, unread = {}, None, []
    with progress.bar("values", sum(path.stat().st_size for path in shards), "B") as advance:
        for path in shards:
            held = [tensor for tensor in tensors.values() if tensor.file == path]
            name, nbytes = path.name, path.stat().st_size
            if quick and nbytes >= LARGE:
                unread.append(f"{name} ({size(nbytes)})")
            elif name in recorded and path.suffix == ".safetensors":
                hashes[name], found = read_through(path, held, advance)
                broken = broken or found
            else:
                broken = broken or first_nonfinite(held, advance)
    _say_values(findings, broken, unread, len(list(shards)), tensors.values())
    if record:
        _compare_recorded(findings, directory, recorded, hashes, quick, progress)
    elif not (directory / provenance.FILE_NAME).is_file():
        findings.add("recorded hashes", "note", f"no {provenance.FILE_NAME}: there are none to compare the files with")


def _compare_recorded(
    findings: Findings,
    directory: Path,
    recorded: dict[str, Any],
    known: dict[str, str],
    quick: bool,
    progress: Progress,
) -> None:
    """Compare every recorded hash that was not computed yet, and say which files have none."""
    standing: dict[Standing, list[str]] = {kind: [] for kind in get_args(Standing)}
    present = [
        path.relative_to(directory).as_posix()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(directory).parts)
    ]
    left = sum((directory / name).stat().st_size for name in present if name in recorded and name not in known)
    with progress.bar("hashes", left, "B") as advance:
        for name, digest in recorded.items():
            standing[_standing(directory, name, digest, known, quick, advance)].append(name)
    _say_hashes(findings, standing)
    unrecorded = [name for name in present if name not in recorded and name != provenance.FILE_NAME]
    if unrecorded:
        findings.add("recorded hashes", "skip", f"{provenance.FILE_NAME} records no hash of {_listed(unrecorded)}")


def _record(findings: Findings, directory: Path) -> dict[str, Any]:
    try:
        return provenance.read(directory) or {}
    except ShortstackError as error:
        findings.add("shortstack.json", "fail", error.message)
        return {}


def _say_values(
    findings: Findings, broken: str | None, unread: list[str], files: int, tensors: Iterable[TensorInfo]
) -> None:
    if broken:
        findings.add("values", "fail", f"tensor {broken!r} holds NaN or infinity")
    elif len(unread) < files:
        where = f" in {files - len(unread)} of {files} files" if unread else ""
        findings.add("values", "ok", f"no NaN, no infinity{where}")
    if unread:
        findings.add("values", "skip", f"--quick: not read: {_listed(unread)}")
    unknown = sorted({tensor.dtype for tensor in tensors if not values_are_known(tensor.dtype)})
    if unknown:
        findings.add("values", "skip", f"not looked for NaN in tensors of type {', '.join(unknown)}")


def _say_hashes(findings: Findings, standing: dict[Standing, list[str]]) -> None:
    """A line for every way in which recorded files stand."""
    what, total = "recorded hashes", sum(map(len, standing.values()))
    changed, missing = standing["changed"], standing["missing"]
    if "README.md" in changed:  # a card is there to be edited
        changed.remove("README.md")
        findings.add(what, "note", "README.md was edited since")
    if changed:
        verb = "is not the file that shortstack.json records" if len(changed) == 1 else "are not as recorded"
        findings.add(what, "fail", f"{_listed(changed)} {verb}")
    known = (*RETRAINING_FILES, PLAN_FILE, "README.md")
    aside = [name for name in missing if name in known or name.startswith("adapter/")]
    if aside:  # beside the checkpoint, and a user's to take away
        missing = [name for name in missing if name not in aside]
        findings.add(what, "note", f"no longer there: {_listed(aside)}")
    if missing:
        findings.add(what, "fail", f"missing, though shortstack.json records it: {_listed(missing)}")
    if standing["same"] and not changed and not missing:
        count = len(standing["same"])
        findings.add(what, "ok", f"{count} of {total} files computed: as shortstack.json records them")
    if standing["large"]:
        findings.add(what, "skip", f"--quick: not computed: {_listed(standing['large'])}")
    if standing["elsewhere"]:
        findings.add(what, "skip", f"not in the cache of the hub: {_listed(standing['elsewhere'])}")


def _standing(
    directory: Path, name: str, digest: Any, known: dict[str, str], quick: bool, advance: Callable[[int], object]
) -> Standing:
    """How a recorded file stands: as it was written, changed, missing, or not compared."""
    path = directory / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return "changed"
    if not path.is_file():
        return "elsewhere" if is_not_downloaded(directory, name) else "missing"
    if name not in known and quick and path.stat().st_size >= LARGE:
        return "large"
    return "same" if (known.get(name) or file_sha256(path, advance)) == digest else "changed"


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
