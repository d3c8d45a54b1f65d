"""Folders of comma-separated tables (`--csv DIR`): how they are checked, written, and named for each model."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.errors import UsageError
from shortstack.runtime.atomic_output import check_writable_file, write_file

if TYPE_CHECKING:
    from shortstack.artifacts.results import Result

MIB = 1 << 20


def check_csv_folder(folder: Path | None) -> None:
    """Fail now rather than after the work when no tables could be written there.

    Raises:
        ShortstackError: it is a file, is named like one, or cannot be written.
    """
    if folder is None:
        return
    if folder.suffix == ".csv" and not folder.is_dir():
        raise UsageError(f"--csv {folder}: expected a folder", hint=f"--csv {folder.with_suffix('')}")
    check_writable_file(folder / "table.csv")


def write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    """Write one table, whole or not at all; its folder is made."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(rows)
    write_file(path, stream.getvalue().encode())


def file_name(text: str) -> str:
    """A text as a part of a file's or column's name."""
    return re.sub(r"[^\w.@-]", "_", text.rstrip("/").rpartition("/")[2])


def model_folders(models: Sequence[str]) -> dict[str, str]:
    """A folder for each model: the end of its name, and a number where two have the same."""
    found: dict[str, str] = {}
    for model in dict.fromkeys(models):
        name = file_name(model).strip(".") or "model"
        number = sum(re.fullmatch(rf"{re.escape(name)}(-\d+)?", known) is not None for known in found.values())
        found[model] = name if not number else f"{name}-{number + 1}"
    return found


def weights_mib(result: Result) -> float:
    """What the weights of a model take in memory, in what it was computed in."""
    itemsize = {"float64": 8, "float32": 4, "F32": 4}.get(str(result.settings["dtype"]), 2)
    return result.parameters * itemsize / MIB
