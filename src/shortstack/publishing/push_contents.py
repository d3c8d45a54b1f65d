"""What of a checkpoint's folder goes to the hub, and what of it must not: secrets, temporary files, places on a disk."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortstack.artifacts.provenance import FILE_NAME, PLAN_FILE
from shortstack.checkpoint.headers import ADAPTER_FILE, checked_link
from shortstack.common.json_text import json_text, read_json
from shortstack.common.paths import is_path, without_paths
from shortstack.publishing.card_text import CARD, PLACEHOLDER, base_model_of

# Documents that belong to a model although no command wrote them.
_DOCUMENT = re.compile(
    r"(licen[cs]e|notice)[^/]*|[^/]+\.(md|png|jpe?g|gif|svg|webp)|\.eval_results/[^/]+\.yaml", re.IGNORECASE
)
_SECRET_NAME = re.compile(
    r"(.*[._-])?(secrets?|credentials?|passwords?|api_?keys?|access_?tokens?|id_(rsa|dsa|ecdsa|ed25519))([._-].*)?"
    r"|\.env(\..*)?|\.netrc|\.npmrc|\.pypirc|token(\.txt)?|.*\.(pem|key|p12|pfx|keystore|kdbx)",
    re.IGNORECASE,
)
_SECRET = re.compile(
    rb"\bhf_[A-Za-z0-9]{30,}|\bsk-[A-Za-z0-9_-]{32,}|\bgh[pousr]_[A-Za-z0-9]{36}|\bgithub_pat_\w{40,}|\bAKIA[0-9A-Z]{16}\b"
    rb"|\bglpat-[\w-]{20,}|-----BEGIN [A-Z ]*PRIVATE KEY-----|https?://[^/\s:@]+:[^/\s@]+@"
)
_TEXT_LIMIT = 1_000_000  # bytes; what is larger is a tokenizer or weights
_WEIGHTS = (".safetensors", ".png", ".jpg", ".jpeg", ".gif", ".webp")
_JSON_OF_OURS = (FILE_NAME, PLAN_FILE, "retraining.json")
# Fields of our records that name a model; of two parts, `runs/pruned` is a folder and `org/name` an id.
_MODELS = ("source", "teacher", "adapter", "base", "dense")
_TEXTS = ("data", "calibration", "taught")


@dataclass(frozen=True)
class PushFile:
    """One file of the repository.

    Attributes:
        name: The name of the file in the repository.
        nbytes: The size of the file in bytes.
        content: The path of the file, or its bytes if the pushed file differs from the local one.
    """

    name: str
    nbytes: int
    content: Path | bytes

    def data(self) -> bytes:
        """All bytes of the file."""
        return self.content if isinstance(self.content, bytes) else self.content.read_bytes()


@dataclass(frozen=True)
class Contents:
    """The files to push, and the files that are not pushed.

    Attributes:
        files: The files to push, in the order of names.
        left_out: The files that are not pushed, each with the reason.
        secrets: The files that seem to hold an access token or a key.
        paths: The local paths that the card shows.
    """

    files: list[PushFile]
    left_out: dict[str, str]
    secrets: list[str]
    paths: list[str]


def contents_of(directory: Path, record: Mapping[str, Any], repository: str) -> Contents:
    """Choose the files of a checkpoint, and make those that are not pushed as they are.

    The card gets the repository's name where it speaks of itself, shortstack.json no paths. A link that leads out of the
    folder is refused.

    Args:
        directory: the checkpoint.
        record: its shortstack.json.
        repository: org/name.

    Raises:
        ShortstackError: a file is a link that leads out of the folder.
    """
    chosen: dict[str, Path | bytes] = {}
    left_out = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_dir() and not path.is_symlink():
            continue
        if reason := _reason(name, record["files"]):
            left_out[name] = reason
        else:
            chosen[name] = checked_link(path, directory, False)
    if CARD in chosen:
        chosen[CARD] = (directory / CARD).read_bytes().replace(PLACEHOLDER.encode(), repository.encode())
    for name in _JSON_OF_OURS:
        if name in chosen and name != FILE_NAME:
            chosen[name] = _as_json(without_paths(read_json((directory / name).read_bytes())))
    pushed = pushed_record(record, {name: content for name, content in chosen.items() if name != FILE_NAME})
    chosen[FILE_NAME] = _as_json(pushed)
    files = [
        PushFile(name, len(content) if isinstance(content, bytes) else content.stat().st_size, content)
        for name, content in sorted(chosen.items())
    ]
    secrets = [file.name for file in files if _holds_secret(file)]
    shown = (directory / CARD).read_text("utf-8", "replace") if CARD in chosen else ""
    return Contents(files, left_out, secrets, sorted(path for path in _paths_in(record) if path in shown))


def pushed_record(record: Mapping[str, Any], contents: Mapping[str, Path | bytes]) -> dict[str, Any]:
    """shortstack.json as others may read it: no paths, and the hashes of what is pushed beside it.

    Args:
        record: as it is on the disk.
        contents: what is pushed, by name.
    """
    known = record["files"]
    files = {
        name: hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else known[name]
        for name, content in contents.items()
        if isinstance(content, bytes) or name in known
    }
    base = base_model_of(record)
    return {**without_paths(_named_models({k: v for k, v in record.items() if k != "files"}, base)), "files": files}


def _named_models(value: Any, base: str, key: str = "") -> Any:
    """A record in which a folder of two parts (`runs/pruned`) is called by its last; ids of the base model stay."""
    if isinstance(value, dict):
        inside = key in _TEXTS
        return {
            name: _last_part(one, base) if name in _MODELS and not inside and isinstance(one, str)
            else _named_models(one, base, name)
            for name, one in value.items()
        }  # fmt: skip
    return [_named_models(one, base, key) for one in value] if isinstance(value, list) else value


def _last_part(source: str, base: str) -> str:
    is_base = bool(base) and source.partition("@")[0] == base
    return source if is_base else source.rstrip("/").rpartition("/")[2]


def _reason(name: str, recorded: Mapping[str, Any]) -> str:
    """Why a file stays here; empty where it goes."""
    last = name.rpartition("/")[2]
    if _SECRET_NAME.fullmatch(last):
        return "its name is that of a secret"
    if ".shortstack" in last or last.endswith((".tmp", ".lock", ".incomplete", "~")):
        return "a temporary file"
    if name.startswith("adapter/") or ADAPTER_FILE.fullmatch(last):
        return "an adapter, which has a repository of its own"
    if name in recorded or name == FILE_NAME or _DOCUMENT.fullmatch(name):
        return ""
    return "hidden" if name.startswith(".") else f"{FILE_NAME} does not name it"


def _holds_secret(file: PushFile) -> bool:
    small = file.nbytes <= _TEXT_LIMIT and not file.name.endswith(_WEIGHTS)
    return small and _SECRET.search(file.data()) is not None


def _paths_in(value: Any) -> set[str]:
    """All paths in a record."""
    if isinstance(value, dict):
        return {path for one in value.values() for path in _paths_in(one)}
    if isinstance(value, list):
        return {path for one in value for path in _paths_in(one)}
    return {value} if isinstance(value, str) and len(value) > 2 and is_path(value) else set()


def _as_json(record: Any) -> bytes:
    return (json_text(record, indent=1) + "\n").encode()
