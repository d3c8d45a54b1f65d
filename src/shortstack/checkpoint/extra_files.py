"""What goes along with the weights of a new checkpoint: tokenizer, templates and the like, and the record of its making."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shortstack.artifacts import provenance
from shortstack.checkpoint.byte_copy import write_hashed
from shortstack.checkpoint.headers import INDEX, checked_link
from shortstack.checkpoint.known_faults import repaired
from shortstack.checkpoint.reader import Checkpoint

# Never copied: other forms of the weights, code, and what shortstack writes itself.
_NOT_COPIED_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".py", ".lock",
)  # fmt: skip
_NOT_COPIED_NAMES = ("config.json", INDEX, "README.md", provenance.FILE_NAME, *provenance.RETRAINING_FILES)
_COPIED_FOLDERS = ("additional_chat_templates",)
_LARGEST_COPIED_FILE = 500_000_000  # bytes; tokenizers are far smaller


def copy_companions(checkpoint: Checkpoint, directory: Path, *, allow_links: bool = False) -> dict[str, str]:
    """Copy tokenizer, chat templates, generation config, licence: everything that is neither weights nor code.

    Returns:
        sha256 of every file, by name.
    """
    files = {}
    for path in _other_files(checkpoint.directory):
        name = str(path.relative_to(checkpoint.directory))
        data = checked_link(path, checkpoint.directory, allow_links).read_bytes()
        files[name] = write_hashed(directory / name, repaired(checkpoint.repair, name, data))
    return files


def continued_record(
    checkpoint: Checkpoint, step: dict[str, Any], kept: Sequence[int], files: dict[str, str]
) -> dict[str, Any]:
    """shortstack.json of what a step made of a checkpoint: its history goes on.

    Args:
        checkpoint: what the step began with.
        step: what was done.
        kept: the blocks of the original model that are left.
        files: sha256 of the new files, by name.
    """
    before = checkpoint.provenance or {}
    return {
        "schema": provenance.SCHEMA,
        "source": before.get("source", checkpoint.source),
        **({"revision": checkpoint.revision} if checkpoint.revision and not before else {}),
        "source_fingerprint": before.get("source_fingerprint", checkpoint.fingerprint),
        "original_depth": before.get("original_depth", checkpoint.depth),
        "kept_blocks": list(kept),
        "steps": [*before.get("steps", []), step],
        "files": dict(sorted(files.items())),
    }


def _other_files(directory: Path) -> list[Path]:
    found = []
    for folder in (directory, *(directory / name for name in _COPIED_FOLDERS)):
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            if not path.is_file() or path.name.startswith(".") or path.stat().st_size > _LARGEST_COPIED_FILE:
                continue
            if path.name not in _NOT_COPIED_NAMES and not path.name.endswith((*_NOT_COPIED_SUFFIXES, ".index.json")):
                found.append(path)
    return found
