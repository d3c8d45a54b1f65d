"""Find the weight files of a checkpoint and check that index and files agree. No tensor is read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from shortstack.checkpoint.headers import TensorInfo, read_header
from shortstack.errors import ShortstackError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED_SINGLE = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
_INDEX_LIMIT = 200_000_000  # bytes

# Tensors by name in the order of files and bytes, and the files' metadata.
Weights = tuple[dict[str, TensorInfo], dict[Path, dict[str, str]]]


def read_weights(directory: Path, *, allow_links: bool = False) -> Weights:
    """The tensors of a checkpoint directory: safetensors where there are any, else `.bin` files.

    Args:
        directory: the checkpoint.
        allow_links: read weight files that are links to places outside the directory.

    Raises:
        ShortstackError: no weights, an ambiguous or incomplete set of files, or an index that contradicts them.
    """
    from shortstack.checkpoint.torch_bin import read_pickled

    for single_name, index_name, read in ((SINGLE, INDEX, read_header), (PICKLED_SINGLE, PICKLED_INDEX, read_pickled)):
        single, index = directory / single_name, directory / index_name
        if single.is_file() and index.is_file():
            raise ShortstackError(
                f"{directory}: holds both {single_name} and {index_name}; which one counts is ambiguous",
                hint="remove the one that does not belong to this checkpoint",
            )
        if single.is_file():
            return _index_tensors([checked_link(single, directory, allow_links)], read)
        if index.is_file():
            return _sharded(directory, index, read, allow_links)
    shards = sorted(path.name for path in directory.glob("*.safetensors"))
    if shards:
        raise ShortstackError(
            f"{directory}: holds {shards[0]}, but neither {SINGLE} nor {INDEX}", hint="download incomplete?"
        )
    raise ShortstackError(f"{directory}: no weights ({SINGLE} or {INDEX})", hint="download incomplete?")


def has_weights(directory: Path) -> bool:
    """Whether any weight file that counts is there (complete or not)."""
    names = [SINGLE, PICKLED_SINGLE, PICKLED_INDEX]
    return any((directory / name).is_file() for name in names) or bool(list(directory.glob("model-*.safetensors")))


def stray_shards(directory: Path, shards: set[Path]) -> list[str]:
    """Weight files in the directory that the index does not name: left over, and not copied."""
    return sorted(path.name for path in directory.glob("*.safetensors") if path not in shards)


def checked_link(path: Path, directory: Path, allow_links: bool) -> Path:
    """Refuse a link that leaves the directory, unless into the blobs of the hub cache that the directory is part of.

    Raises:
        ShortstackError: it leads elsewhere and `allow_links` is not set.
    """
    if not path.is_symlink() or allow_links:
        return path
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(directory))
    repository = home.parent.parent  # models--org--name/snapshots/REVISION
    in_cache = home.parent.name == "snapshots" and real.parent == repository / "blobs"
    if home in real.parents or in_cache:
        return path
    raise ShortstackError(
        f"{path}: is a link to {real}, outside the checkpoint", hint="--allow-links follows it, if it is yours"
    )


def _sharded(
    directory: Path, index: Path, read: Callable[[Path], tuple[list[TensorInfo], dict[str, str]]], allow_links: bool
) -> Weights:
    weight_map = _weight_map(index)
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        listed = ", ".join(missing)
        raise ShortstackError(f"{directory}: shard missing: {listed} (named by {index.name})", hint="download it again")
    tensors, shards = _index_tensors([checked_link(directory / name, directory, allow_links) for name in names], read)
    for name, shard in weight_map.items():
        if name not in tensors:
            raise ShortstackError(f"{index}: names {name!r} in {shard}, but no shard holds it")
        if tensors[name].file.name != shard:
            raise ShortstackError(f"{index}: says {name!r} is in {shard}, but it is in {tensors[name].file.name}")
    unlisted = sorted(set(tensors) - set(weight_map))
    if unlisted:
        raise ShortstackError(
            f"{index}: does not name {unlisted[0]!r} ({len(unlisted)} tensors), which the shards hold",
            hint="download the index again; index and shards must agree",
        )
    return tensors, shards


def _weight_map(index: Path) -> dict[str, str]:
    if index.stat().st_size > _INDEX_LIMIT:
        raise ShortstackError(f"{index}: {index.stat().st_size} bytes; an index has at most {_INDEX_LIMIT}")
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
    except (ValueError, RecursionError, KeyError, TypeError):
        raise ShortstackError(f"{index}: not a weight index (no weight_map)", hint="download it again") from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ShortstackError(f"{index}: weight_map is empty or not an object", hint="download it again")
    for shard in weight_map.values():
        if not isinstance(shard, str) or shard in ("", ".", "..") or Path(shard).name != shard or "\0" in shard:
            raise ShortstackError(f"{index}: shard {shard!r} must be a plain file name in the same directory")
    return weight_map


def _index_tensors(paths: list[Path], read: Callable[[Path], tuple[list[TensorInfo], dict[str, str]]]) -> Weights:
    tensors: dict[str, TensorInfo] = {}
    shards = {}
    for path in paths:
        listed, shards[path] = read(path)
        for tensor in listed:
            if tensor.name in tensors:
                raise ShortstackError(
                    f"{path}: tensor {tensor.name!r} is also in {tensors[tensor.name].file.name}",
                    hint="download the checkpoint again; which of the two counts is not known",
                )
            tensors[tensor.name] = tensor
    return tensors, shards
