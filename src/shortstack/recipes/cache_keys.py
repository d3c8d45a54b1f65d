"""What makes a step, by content: a step is not run again only where all of it is as it was."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shortstack.artifacts import provenance
from shortstack.artifacts.provenance import versions
from shortstack.checkpoint.tokenizer_files import chosen_tokenizer
from shortstack.common.json_text import json_text
from shortstack.common.progress import Progress
from shortstack.common.source_names import before_and_place
from shortstack.errors import ShortstackError
from shortstack.families.open_model import open_model
from shortstack.publishing.card import EVAL_RESULTS, without_card
from shortstack.publishing.card_text import CARD
from shortstack.recipes.merge import RUN
from shortstack.recipes.resolve import Reference, Step
from shortstack.recipes.schema import CONTENTS, OUTPUTS, SOURCES

_HASHED_WHOLE = 1 << 30  # bytes; of a larger file, both ends, its size and its time of change
_END = 1 << 20


def step_key(step: Step, made: Mapping[str, str]) -> dict[str, Any]:
    """All that makes a step: its stage and options, what is in the files they name, and the versions that compute.

    Args:
        step: the step.
        made: step before it, and `model` -> identity of what is there.

    Raises:
        ShortstackError: a model cannot be opened, or a file read.
    """
    options = {name: _identity(step, name, value, made) for name, value in step.values.items()}
    return {"stage": step.command.name, "options": options, "versions": versions("peft", "accelerate", "lm_eval")}


def _identity(step: Step, name: str, value: Any, made: Mapping[str, str]) -> Any:
    if isinstance(value, list):
        return [_identity(step, name, part, made) for part in value]
    if isinstance(value, Reference):
        return dict(made) if value.step == RUN else made[value.step]
    if not isinstance(value, str) or name in OUTPUTS:
        return value
    parameter = step.command.options[name]
    if name == "tokenizer":
        chosen = chosen_tokenizer(value)
        return chosen.sha256 if chosen is not None else None
    if name in CONTENTS:
        return [_text_identity(part) for part in value.split(",")]
    if name in SOURCES:
        return model_identity(value)
    return _text_identity(value) if parameter.is_path else value


def model_identity(model: str) -> str:
    """A checkpoint's fingerprint."""
    return open_model(model, progress=Progress(quiet=True)).fingerprint


def _text_identity(source: str) -> str:
    """What is in a file or folder; a name that is neither stands for itself (the package's text, a set on the hub)."""
    before, place = ("", source) if Path(source).expanduser().exists() else before_and_place(source)
    path = Path(place).expanduser()
    return f"{before}sha256:{content_hash(path)}" if path.exists() else source


def content_hash(path: Path) -> str:
    """sha256 over the names and bytes of a file, or of all files in a folder; of huge files over their ends.

    Raises:
        ShortstackError: one cannot be read.
    """
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    try:
        for file in files:
            digest.update(str(file.relative_to(path)).encode() + b"\0" if file != path else b"")
            with file.open("rb") as stream:
                stat = file.stat()
                if stat.st_size <= _HASHED_WHOLE:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
                else:
                    digest.update(f"{stat.st_size} {stat.st_mtime_ns}".encode() + stream.read(_END))
                    stream.seek(-_END, 2)
                    digest.update(stream.read(_END))
    except OSError as error:
        raise ShortstackError(f"{path}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def output_identity(output: Path) -> str | None:
    """Of what a step left behind, from what is on the disk now; None where it is not there.

    Of a folder, such as a checkpoint, by every file's name, size and both ends; but for its model card, which a later step
    may renew.
    """
    if output.is_file():
        return f"sha256:{content_hash(output)}"
    if not output.is_dir():
        return None
    digest = hashlib.sha256()
    record = _record(output)
    apart = {CARD, EVAL_RESULTS, provenance.FILE_NAME} if record is not None else set()
    for file in sorted(output.rglob("*")):
        name = file.relative_to(output).as_posix()
        if file.is_file() and name not in apart:
            digest.update(f"{name}\0{file.stat().st_size}\0{_quick_hash(file)}\n".encode())
    if record is not None:
        digest.update(json_text(without_card(record)).encode())
    return f"files:{digest.hexdigest()}"


def _record(output: Path) -> dict[str, Any] | None:
    try:
        return provenance.read(output)
    except ShortstackError:  # damaged: it is as any other file, and was changed since
        return None


def _quick_hash(file: Path) -> str:
    """Of a small file all of it; of weights both ends, and the header that lies in the first."""
    with file.open("rb") as stream:
        head = stream.read(_END)
        stream.seek(max(0, file.stat().st_size - _END))
        return hashlib.sha256(head + stream.read(_END)).hexdigest()
