"""What goes along with the weights of a new checkpoint: tokenizer, templates and the like, and the record of its making.

A file that says something about the blocks (another framework's config, an index of another form of the weights,
statistics per block) is wrong once blocks are gone. Tokenizers, templates and licences say nothing about blocks and are
not looked at: a token may be `h.2`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shortstack.artifacts import provenance
from shortstack.checkpoint.anatomy import Anatomy
from shortstack.checkpoint.byte_copy import write_hashed
from shortstack.checkpoint.config_file import config_text, repaired
from shortstack.checkpoint.headers import ADAPTER_FILE, INDEX, PICKLED_INDEX, checked_link
from shortstack.checkpoint.reader import Checkpoint
from shortstack.checkpoint.renumber_names import Renumbering, moved_names
from shortstack.checkpoint.tokenizer_files import is_tokenizer_file
from shortstack.common.progress import Progress
from shortstack.errors import ShortstackError

_SILENT = re.compile(
    r"(.*token.*|vocab.*|merges.*|tekken.*|chat_template.*|(pre)?processor.*|video_preprocessor.*|generation_config.*|licen[cs]e.*"
    r"|notice.*|.*\.(model|tiktoken|jinja|md|txt|pdf|png|jpe?g|gif|svg|webp))",
    re.IGNORECASE,
)
# `n_layers`, `num_hidden_layers`, `block_count`, `layer_range`, whatever stands before a dot
_COUNT = r"(?:(?:n|num|number_of|total)_(?:[a-z]+_)?(?:layers?|blocks?)|(?:layers?|blocks?)_(?:count|range)|layers)"
_NUMBERED = re.compile(rb"(?<![A-Za-z0-9])(?:layers?|blocks?|blk|h)[./_\[](\d{1,5})(?=[./_\]\"'])")

# `n_heads`, `num_key_value_heads`, `intermediate_size`, `hidden_dim` (as Mistral has it), whatever stands before a dot
_WIDTH = r"(?:n|num)_(?:attention_|key_value_|kv_)?heads?|intermediate_size|hidden_dim|ffn_dim|n_inner"

WIDTH = "states the number of heads or channels"
NUMBER, EACH, NAMES = "states the number of blocks", "has a value for each block", "names blocks by number"
# Never copied: other forms of the weights, code, and what shortstack writes itself.
_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ggml", ".ot",
    ".npz", ".npy", ".pb", ".tflite", ".mlmodel", ".nemo", ".engine", ".plan", ".llamafile", ".pkl", ".data", ".index",
    ".index.json", ".distcp", ".tar", ".zip",
)  # fmt: skip
_OWN = ("config.json", "README.md", provenance.FILE_NAME, provenance.PLAN_FILE, *provenance.RETRAINING_FILES)
# Quantization's own records: names of modules and nothing else that depends on the blocks.
_RENUMBERED = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_COPIED_FOLDERS = ("additional_chat_templates",)
_LARGEST_COPIED_FILE = 500_000_000  # bytes; tokenizers are far smaller
_LISTED = 12


def restates(name: str, data: bytes, anatomy: Anatomy) -> str | None:
    """Why a file holds for this depth alone, or None where it says nothing about blocks.

    Args:
        name: the file's name.
        data: what is in it.
        anatomy: of the checkpoint that it lies beside.
    """
    if _SILENT.fullmatch(name):
        return None
    try:
        content = json.loads(data) if name.endswith(".json") else None
    except (ValueError, RecursionError):
        content = None
    depth = anatomy.depth
    if content is not None:
        for key, value in _entries(content):
            if reason := _entry(key, value, depth):
                return reason
    elif re.search(rf"(?mi)^[\s\-\"']*{_COUNT}[\"']?\s*[:=]\s*[\"']?(?:\[\s*\d+\s*,\s*)?{depth}\b".encode(), data):
        return NUMBER
    numbers = {int(number) for number in _NUMBERED.findall(data)}
    return NAMES if len({number for number in numbers if number < depth}) > min(1, depth - 1) else None


def states_widths(name: str, data: bytes) -> str | None:
    """Why a file holds for these numbers of heads and channels alone, or None where it says nothing about them."""
    if _SILENT.fullmatch(name) or not name.endswith(".json"):
        return None
    try:
        entries = list(_entries(json.loads(data)))
    except (ValueError, RecursionError):
        return None
    return WIDTH if any(re.fullmatch(_WIDTH, key.lower().rpartition(".")[2]) for key, _ in entries) else None


def _entry(key: str, value: Any, depth: int) -> str | None:
    name = key.lower().replace("-", "_").rpartition(".")[2]
    if re.fullmatch(_COUNT, name) and (value == depth or (isinstance(value, list) and value[-1:] == [depth])):
        return NUMBER
    about_blocks = "layer" in name or "block" in name
    if isinstance(value, list) and len(value) == depth > 1 and about_blocks:
        return EACH
    return EACH if isinstance(value, dict) and depth > 1 and value.keys() == set(map(str, range(depth))) else None


def _entries(content: Any) -> Iterator[tuple[str, Any]]:
    """All (key, value) pairs of nested JSON."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield key, value
            yield from _entries(value)
    elif isinstance(content, list):
        for value in content:
            yield from _entries(value)


def copy_companions(
    checkpoint: Checkpoint,
    directory: Path,
    *,
    kept: Sequence[int] | None = None,
    narrower: bool = False,
    progress: Progress | None = None,
) -> dict[str, str]:
    """Copy tokenizer, chat templates, generation config, licence: everything that is neither weights nor code.

    A tokenizer that was chosen in place of the checkpoint's own is copied instead of it, with its chat templates.

    Args:
        checkpoint: what is worked on.
        directory: the new checkpoint's.
        kept: positions of the blocks that stay, where some go: files that say something about the blocks are renumbered
            (records of quantization) or left out (all others).
        narrower: the new checkpoint has fewer heads or channels: files that state how many are left out.
        progress: where it is reported what was left out or renumbered.

    Returns:
        sha256 of every file, by name.
    """
    files: dict[str, str] = {}
    renumbered: list[str] = []
    shorter = kept if kept is not None and len(kept) < checkpoint.depth else None
    paths, left_out = _other_files(checkpoint)
    if checkpoint.tokenizer is not None:
        paths = [path for path in paths if not _is_own_tokenizers(path)]
        for name, data in checkpoint.tokenizer.files.items():
            files[name] = write_hashed(directory / name, data)
        (progress or Progress(quiet=True)).say(f"the tokenizer's files are those of {checkpoint.tokenizer.source}")
    for path in paths:
        name = str(path.relative_to(checkpoint.directory))
        data = repaired(
            checkpoint.repair, name, checked_link(path, checkpoint.directory, checkpoint.allow_links).read_bytes()
        )
        if shorter is not None and name in _RENUMBERED:
            renumbered.append(name)
            data = _with_new_numbers(path, data, checkpoint, shorter)
        elif reason := (shorter is not None and restates(path.name, data, checkpoint.anatomy)) or (
            narrower and states_widths(path.name, data)
        ):
            left_out.append((name, reason))
            continue
        (directory / name).parent.mkdir(exist_ok=True)
        files[name] = write_hashed(directory / name, data)
    _report(left_out, renumbered, progress or Progress(quiet=True))
    return files


def _is_own_tokenizers(path: Path) -> bool:
    return is_tokenizer_file(path.name) or path.parent.name in _COPIED_FOLDERS


def _with_new_numbers(path: Path, data: bytes, checkpoint: Checkpoint, kept: Sequence[int]) -> bytes:
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        raise ShortstackError(f"{path}: not valid JSON", hint="remove the file, or download it again") from None
    moved = moved_names(record, Renumbering(checkpoint.anatomy, kept, str(path)))
    return data if moved == record else config_text(moved).encode()


def _report(left_out: Sequence[tuple[str, str]], renumbered: Sequence[str], progress: Progress) -> None:
    if left_out:
        listed = ", ".join(f"{name} ({reason})" for name, reason in left_out[:_LISTED])
        more = f" and {len(left_out) - _LISTED} more" if len(left_out) > _LISTED else ""
        progress.say(f"not copied: {listed}{more}")
    if renumbered:
        progress.say(f"renumbered for the remaining blocks: {', '.join(renumbered)}")


def continued_record(
    checkpoint: Checkpoint, step: dict[str, Any], kept: Sequence[int], files: dict[str, str]
) -> dict[str, Any]:
    """shortstack.json of what a step made of a checkpoint: the history is continued.

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
        **{key: before[key] for key in ("base_model", "revision") if key in before},
        **(
            {"base_model": checkpoint.hub_id, "revision": checkpoint.revision}
            if checkpoint.hub_id and not before
            else {}
        ),
        "source_fingerprint": before.get("source_fingerprint", checkpoint.fingerprint),
        "original_depth": before.get("original_depth", checkpoint.depth),
        "kept_blocks": list(kept),
        "steps": [*before.get("steps", []), step],
        "files": dict(sorted(files.items())),
    }


def _other_files(checkpoint: Checkpoint) -> tuple[list[Path], list[tuple[str, str]]]:
    """(files that may be copied, what may not and why, by name); nothing is said of what is rewritten or was reported."""
    home = checkpoint.directory
    found, left_out = [], []
    entries = sorted(home.iterdir()) + [
        path for name in _COPIED_FOLDERS if (home / name).is_dir() for path in sorted((home / name).iterdir())
    ]
    for path in entries:
        if path.name.startswith(".") or path.name in (*_OWN, *_COPIED_FOLDERS) or path.name.endswith(".lock"):
            continue
        reason = _never_copied(path)
        if reason is None:
            found.append(path)
        elif path not in checkpoint.shards and not _reported(path, checkpoint):
            left_out.append((path.name + "/" * path.is_dir(), reason))
    return found, left_out


def _never_copied(path: Path) -> str | None:
    if not path.is_file():
        return "a folder" if path.is_dir() else "not a file"
    if path.name.endswith(_WEIGHTS) or ADAPTER_FILE.fullmatch(path.name):
        return "another form of the weights"
    if path.name.endswith(".py"):
        return "code"
    return "too large" if path.stat().st_size > _LARGEST_COPIED_FILE else None


def _reported(path: Path, checkpoint: Checkpoint) -> bool:
    """Whether a file is the index, or was named when the checkpoint was opened (a stray shard, an adapter)."""
    indices = {shard.suffix for shard in checkpoint.shards}
    index = INDEX if ".safetensors" in indices else PICKLED_INDEX
    named = path.suffix == ".safetensors" or ADAPTER_FILE.fullmatch(path.name) is not None
    return path.name == index or (named and path.parent == checkpoint.directory)
