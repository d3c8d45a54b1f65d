"""Carry a PEFT adapter over a cut: blocks renumbered, those of removed blocks dropped. By byte copy, without torch."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shortstack.checkpoint.byte_copy import TensorCopy, copy_tensors, new_header, write_hashed
from shortstack.checkpoint.config_file import config_text
from shortstack.checkpoint.headers import TensorInfo, read_header
from shortstack.checkpoint.reader import Checkpoint, read_checkpoint
from shortstack.checkpoint.renumber_names import Renumbering, renumbered
from shortstack.common.formatting import ranges
from shortstack.common.json_text import json_text
from shortstack.common.progress import Progress
from shortstack.errors import ShortstackError, system_reason

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
_PEFT_PREFIX = "base_model.model."
# Entries of adapter_config.json that hold names or patterns of modules.
_NAMES = ("target_modules", "exclude_modules", "modules_to_save", "target_parameters")
_BY_NAME = ("rank_pattern", "alpha_pattern")
_NUMBER = re.compile(r"(?<![A-Za-z0-9_])\d")  # of a block, in a name or a pattern; none in `w1`, `fc2`
_BEGINS_WITH_NUMBER = re.compile(r"(\d+)(?:\.|\\\.|\[\.\]|$)(\w*)")  # and the word behind it


def carry_adapter(
    adapter: Path,
    checkpoint: Checkpoint,
    kept: Sequence[int],
    base: str,
    directory: Path,
    progress: Progress | None = None,
) -> dict[str, str]:
    """Write the adapter for the checkpoint that keeps the blocks at positions `kept`.

    Args:
        adapter: the adapter's directory; its block numbers are positions in `checkpoint`.
        checkpoint: what it was trained on.
        kept: the positions that stay.
        base: what the new adapter calls its base model.
        directory: where to write it.
        progress: reports what is taken for granted.

    Returns:
        sha256 of every file written, by name.

    Raises:
        ShortstackError: it is no adapter, or names blocks in a way that cannot be renumbered.
    """
    config = read_adapter_config(adapter)
    tensors, metadata = _tensors(adapter)
    renumber = Renumbering(checkpoint.anatomy, kept, str(adapter / CONFIG))
    found = _adapted_blocks(tensors, renumber)
    if not found and not any(".modules_to_save." in tensor.name for tensor in tensors):
        raise ShortstackError(
            f"{adapter}: none of its tensors belongs to a block", hint="check that it is an adapter of this model"
        )
    _check_blocks(adapter, config, found, checkpoint, progress or Progress(quiet=True))
    copies = [TensorCopy(tensor, name) for tensor in tensors if (name := renumber(tensor.name)) is not None]
    if not copies:
        raise ShortstackError(f"{adapter}: all blocks that it adapts are removed", hint="leave --adapter out")
    directory.mkdir()
    shortened = _shortened(
        _with_container(_named_in_full(config, tensors, found), checkpoint), renumber, kept, adapter / CONFIG
    )
    shortened["base_model_name_or_path"] = base
    files = {WEIGHTS: copy_tensors(copies, directory / WEIGHTS, header=new_header(copies, metadata))}
    files[CONFIG] = write_hashed(directory / CONFIG, config_text(shortened).encode())
    return files


def check_blocks(adapter: Path, checkpoint: Checkpoint, progress: Progress) -> None:
    """Refuse an adapter that adapts blocks which the checkpoint lacks, has under other numbers, or may have.

    Raises:
        ShortstackError: it does; the hint says how a dense model's adapter gets to a pruned one.
    """
    config, (tensors, _) = read_adapter_config(adapter), _tensors(adapter)
    everywhere = Renumbering(checkpoint.anatomy, range(checkpoint.depth), str(adapter / CONFIG))
    _check_blocks(adapter, config, _adapted_blocks(tensors, everywhere), checkpoint, progress)


def _adapted_blocks(tensors: Sequence[TensorInfo], names: Renumbering) -> set[int]:
    """The blocks that an adapter's tensors belong to, by their numbers in the model that it was trained on."""
    return {number for tensor in tensors if (number := names.number_of(tensor.name)) is not None}


def _check_blocks(
    adapter: Path, config: dict[str, Any], found: set[int], checkpoint: Checkpoint, progress: Progress
) -> None:
    trained_on = str(config.get("base_model_name_or_path") or "")
    known = _original_blocks(adapter, trained_on, checkpoint)
    numbers = checkpoint.original_blocks if isinstance(known, str) else known
    original_depth = (checkpoint.provenance or {}).get("original_depth", 0)
    if len(numbers) <= max(found, default=0) < original_depth:
        numbers = tuple(range(original_depth))  # nothing says so, but these are the dense model's numbers
    elif isinstance(known, str) and any(checkpoint.original_blocks[block : block + 1] != (block,) for block in found):
        _take_as_own(adapter, config, found, checkpoint, known, progress)
    places = {original: position for position, original in enumerate(checkpoint.original_blocks)}
    lacking = {block for block in found if block >= len(numbers) or numbers[block] not in places}
    moved = {block for block in found - lacking if places[numbers[block]] != block}
    if not lacking | moved:
        return
    parts = [
        *(
            [f"block {ranges(lacking)}, which {checkpoint.source} (of {checkpoint.depth} blocks) lacks"]
            if lacking
            else []
        ),
        *([f"block {ranges(moved)}, which {'it' if lacking else checkpoint.source} has renumbered"] if moved else []),
    ]
    raise ShortstackError(
        f"{adapter}: adapts {', and '.join(parts)}", hint=_way_on(adapter, numbers, trained_on, checkpoint)
    )


def _take_as_own(
    adapter: Path, config: dict[str, Any], found: set[int], checkpoint: Checkpoint, unknown: str, progress: Progress
) -> None:
    """Report that an adapter of unknown origin counts blocks as the pruned checkpoint does; refuse it where it names
    another base, and may as well count those of the dense model.
    """
    trained_on = str(config.get("base_model_name_or_path") or "")
    names = [config.get("target_modules"), config.get("exclude_modules")]
    is_partial = config.get("layers_to_transform") not in (None, []) or _NUMBER.search(json_text(names))
    if trained_on and (is_partial or found != set(range(checkpoint.depth))):
        record = checkpoint.provenance or {}
        way = _way_on(adapter, range(record.get("original_depth", 0)), str(record.get("source", "")), checkpoint)
        raise ShortstackError(
            f"{adapter}: was trained on {trained_on}, {unknown}; its block {ranges(found)} may be other blocks in "
            f"{checkpoint.source}, which is pruned",
            hint=f"of the dense model: fold it into that (--base), or {way}; of {checkpoint.source}: write that as "
            f"base_model_name_or_path into {adapter / CONFIG}",
        )
    why = f"its base {trained_on} is not known here" if trained_on else f"{CONFIG} names no base"
    progress.say(f"{adapter}: {why}; its block numbers are taken as those of {checkpoint.source}, which is pruned")


def _way_on(adapter: Path, numbers: Sequence[int], trained_on: str, checkpoint: Checkpoint) -> str:
    """How an adapter of the dense model comes to a pruned one; else what does go together."""
    dense = trained_on or str((checkpoint.provenance or {}).get("source", ""))
    removed = ranges(set(numbers) - set(checkpoint.original_blocks)).replace(" ", "")
    if removed and dense:
        return (
            f"shortstack prune {dense} --blocks {removed} --adapter {adapter} --out DIR carries the dense model's adapter "
            "over the cut, to DIR/adapter"
        )
    other = (
        f"give the checkpoint that it was trained on ({trained_on})"
        if trained_on not in ("", checkpoint.source)
        else ""
    )
    return other or "get the adapter again, or give the checkpoint that it was trained on"


def _original_blocks(adapter: Path, trained_on: str, checkpoint: Checkpoint) -> tuple[int, ...] | str:
    """The original numbers of the blocks that an adapter counts: those of the model that it was trained on, if that is
    the checkpoint or of its origin; else what is wrong with that model.
    """
    record = checkpoint.provenance or {}
    unknown = "which is not known here"
    if trained_on and Path(trained_on).is_dir():
        try:
            base = read_checkpoint(trained_on, lambda *_: checkpoint.anatomy.family, allow_links=checkpoint.allow_links)
        except ShortstackError as error:
            unknown = f"which cannot be read ({error.message})"
        else:
            if _origin(base) == _origin(checkpoint):
                return base.original_blocks
            unknown = f"which is not of the same origin as {checkpoint.source}"
    if trained_on and trained_on.partition("@")[0] == str(record.get("source", "")).partition("@")[0]:
        return tuple(range(record["original_depth"]))
    # By the checkpoint's own name, or in its folder, where `prune --adapter` writes it.
    is_own = (
        trained_on.partition("@")[0] == checkpoint.source.partition("@")[0]
        or adapter.resolve().parent == checkpoint.directory.resolve()
    )
    return checkpoint.original_blocks if is_own else unknown


def _origin(checkpoint: Checkpoint) -> str:
    return str((checkpoint.provenance or {}).get("source_fingerprint", checkpoint.fingerprint))


def read_adapter_config(adapter: Path) -> dict[str, Any]:
    """adapter_config.json of a PEFT adapter.

    Raises:
        ShortstackError: it is no adapter, or one whose blocks cannot be told apart.
    """
    path = adapter / CONFIG
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ShortstackError(
            f"{adapter}: not an adapter (no {CONFIG})", hint="give a directory that PEFT wrote"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ShortstackError(
            f"{path}: cannot be read ({system_reason(error)})", hint="download or copy the adapter again"
        ) from None
    if not isinstance(config, dict):
        raise ShortstackError(f"{path}: expected a JSON object, found {type(config).__name__}")
    if config.get("layer_replication"):
        raise ShortstackError(
            f"{path}: layer_replication repeats blocks of the base model, which cannot be renumbered",
            hint="merge the adapter first, then prune",
        )
    return config


def _tensors(adapter: Path) -> tuple[list[TensorInfo], dict[str, str]]:
    if (adapter / WEIGHTS).is_file():
        return read_header(adapter / WEIGHTS)
    if (adapter / PICKLED).is_file():
        from shortstack.checkpoint.torch_bin import read_pickled

        return read_pickled(adapter / PICKLED)
    raise ShortstackError(f"{adapter}: no weights ({WEIGHTS} or {PICKLED})", hint="download or copy the adapter again")


def _named_in_full(config: dict[str, Any], tensors: Sequence[TensorInfo], blocks: set[int]) -> dict[str, Any]:
    """The config with the names of LoRA's modules, as the tensors have them, in place of a pattern that holds numbers."""
    pattern = config.get("target_modules")
    modules = {
        tensor.name.removeprefix(_PEFT_PREFIX).partition(".lora_")[0] for tensor in tensors if ".lora_" in tensor.name
    }
    if not isinstance(pattern, str) or not re.search(r"\d", pattern) or len(modules) < max(1, len(blocks)):
        return config
    return {**config, "target_modules": sorted(modules)}


def _with_container(config: dict[str, Any], checkpoint: Checkpoint) -> dict[str, Any]:
    """The config with the container in front of names that begin with a block's number: PEFT takes ends of names, and
    `3.self_attn.q_proj` is one of `layers.3.self_attn.q_proj`; `3.w1` of an expert stays.
    """
    prefix = checkpoint.anatomy.prefix
    container = prefix.rstrip(".").rpartition(".")[2]

    def whole(name: Any) -> Any:
        begin = _BEGINS_WITH_NUMBER.match(name) if isinstance(name, str) else None
        if begin is None or not any(
            tensor.startswith(f"{prefix}{begin[1]}.{begin[2]}") for tensor in checkpoint.tensors
        ):
            return name
        return f"{container}.{name}"

    edited = dict(config)
    for key in (*_NAMES, *_BY_NAME):
        value = edited.get(key)
        if isinstance(value, list):
            edited[key] = [whole(name) for name in value]
        elif isinstance(value, dict):
            edited[key] = {whole(name): inner for name, inner in value.items()}
    return edited


def _shortened(config: dict[str, Any], renumber: Renumbering, kept: Sequence[int], place: Path) -> dict[str, Any]:
    edited = dict(config)
    layers = edited.get("layers_to_transform")
    if isinstance(layers, int):
        layers = [layers]
    if isinstance(layers, list):
        edited["layers_to_transform"] = renumbered([index for index in layers if type(index) is int], kept)
        if layers and not edited["layers_to_transform"]:
            raise ShortstackError(
                f"{place}: every block of layers_to_transform is removed ({ranges(layers)}), and PEFT reads an empty list "
                "as all blocks",
                hint="keep one of these blocks, or leave --adapter out",
            )
    for key in _NAMES:
        value = edited.get(key)
        if isinstance(value, str):
            edited[key] = renumber(value)
        elif isinstance(value, list):
            edited[key] = [name for item in value if (name := renumber(str(item))) is not None]
    for key in _BY_NAME:
        if isinstance(edited.get(key), dict):
            pairs = ((renumber(name), value) for name, value in edited[key].items())
            edited[key] = {name: value for name, value in pairs if name is not None}
    return edited
