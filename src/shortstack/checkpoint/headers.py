"""Find the weight files of a checkpoint, read and check their headers and their index, without reading a tensor.

The format of safetensors: 8 bytes little-endian header length, that many bytes of JSON (name -> dtype, shape,
data_offsets), then the data. transformers checks little of it, so everything that a download or a disk can break is
checked here.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shortstack.common.json_text import json_text
from shortstack.errors import ShortstackError

# Bits per element, by the names of the format.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
FLOAT_DTYPES = frozenset({"F16", "BF16", "F32", "F64"})
_HEADER_LIMIT = 100_000_000  # bytes; the limit of the reference implementation
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED_SINGLE = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
ADAPTER_FILE = re.compile(r"adapter_(config\.json|model.*\.(safetensors|bin|json))")
_INDEX_LIMIT = 200_000_000  # bytes
_AT_ONCE = 1 << 30  # bytes of one read; macOS refuses those of 2 GiB and more


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `nbytes` bytes from `start` (an absolute offset) in `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_header(path: Path) -> tuple[list[TensorInfo], dict[str, str]]:
    """Return the tensors of a file in the order of their bytes, and the file's metadata.

    Raises:
        ShortstackError: the file is truncated, is not safetensors, or its header contradicts itself or the file's size.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(64)
        _check_start(path, size, start)
        length = int.from_bytes(start[:8], "little")
        if length > _HEADER_LIMIT:
            shown = start[:8].decode("latin-1").encode("unicode_escape").decode()
            raise ShortstackError(f"{path}: not a safetensors file (starts with {shown!r})", hint="download it again")
        if 8 + length > size:
            raise _truncated(path, size, f"at least {8 + length}")
        stream.seek(8)
        raw = stream.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=lambda pairs: _unique(path, pairs))
    except (ValueError, RecursionError) as error:
        raise ShortstackError(f"{path}: the safetensors header is not valid JSON ({error})") from None
    if not isinstance(header, dict):
        raise ShortstackError(f"{path}: the safetensors header is not a JSON object")
    metadata = header.pop("__metadata__", {}) or {}
    tensors = [_tensor(path, name, entry, 8 + length) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.nbytes))
    position = 8 + length
    for tensor in tensors:
        if tensor.start != position:
            problem = "overlaps the tensor before it" if tensor.start < position else "leaves a hole before it"
            raise ShortstackError(f"{path}: tensor {tensor.name!r} {problem} (offset {tensor.start}, not {position})")
        position += tensor.nbytes
    if position > size:
        raise _truncated(path, size, str(position))
    if position < size:
        raise ShortstackError(
            f"{path}: {size - position} bytes after the last tensor (has {size}, expected {position})"
        )
    return tensors, {str(key): str(value) for key, value in metadata.items()}


def write_header(tensors: list[TensorInfo], metadata: dict[str, str]) -> bytes:
    """The header bytes of a file that holds `tensors`, in this order, back to back."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for tensor in tensors:
        end = position + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    raw = json_text(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)  # data starts at a multiple of 8, as the reference implementation writes it
    return len(raw).to_bytes(8, "little") + raw


def raw_header(path: Path) -> bytes:
    """Everything before the tensors of a file that `read_header` has accepted."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        stream.seek(0)
        return stream.read(8 + length)


def read_exactly(descriptor: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Fill `buffer` from `offset` by positioned reads: no mmap, so a shrinking file is an error and not a crash."""
    done = 0
    while done < len(buffer):
        count = _read_at(descriptor, buffer[done : done + _AT_ONCE], offset + done)
        if count == 0:
            raise ShortstackError(
                f"{path}: ended at byte {offset + done} while it was read; it was changed meanwhile",
                hint="download or copy the checkpoint again, then run the same command",
            )
        done += count


def _read_at(descriptor: int, buffer: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [buffer], offset)
    data = os.pread(descriptor, len(buffer), offset)  # Python for macOS before 11
    buffer[: len(data)] = data
    return len(data)


def _check_start(path: Path, size: int, start: bytes) -> None:
    if size == 0:
        raise ShortstackError(f"{path}: is empty (0 bytes)", hint="download the file again")
    if start.startswith(b"version https://git-lfs"):
        raise ShortstackError(f"{path}: is a Git-LFS pointer, not the weights", hint="run: git lfs pull")
    if start.lstrip()[:1] == b"<" and start[7:8] != b"\0":  # text has no zero bytes; a header's length ends in them
        shown = start[:12].decode("latin-1")
        raise ShortstackError(f"{path}: not safetensors (starts {shown!r}: a web page?)", hint="download it again")
    if size < 10:
        raise ShortstackError(f"{path}: {size} bytes is too short for a safetensors file", hint="download it again")


def _truncated(path: Path, size: int, expected: str) -> ShortstackError:
    return ShortstackError(f"{path}: truncated: has {size} bytes, expected {expected}", hint="download the file again")


def _unique(path: Path, pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ShortstackError(f"{path}: the header names {twice!r} twice")
    return result


def _tensor(path: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    place = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ShortstackError(f"{place}: the header entry lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in DTYPE_BITS:
        raise ShortstackError(
            f"{place}: unknown dtype {dtype!r}", hint="a newer shortstack or safetensors may support it"
        )
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise ShortstackError(f"{place}: shape and data_offsets must be lists of whole numbers >= 0")
    nbytes = offsets[1] - offsets[0]
    if math.prod(shape) * DTYPE_BITS[dtype] != nbytes * 8:
        expected = math.prod(shape) * DTYPE_BITS[dtype] // 8
        raise ShortstackError(f"{place}: {dtype} {shape} takes {expected} bytes, the header gives it {nbytes}")
    return TensorInfo(name, dtype, tuple(shape), path, data_start + offsets[0], nbytes)


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


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
            f"{directory}: holds {shards[0]}, but neither {SINGLE} nor {INDEX}",
            hint="the download may be incomplete: download the checkpoint again",
        )
    raise ShortstackError(
        f"{directory}: no weights ({SINGLE} or {INDEX})",
        hint="the download may be incomplete: download the checkpoint again",
    )


def has_weights(directory: Path) -> bool:
    """Whether any weight file that counts is there (complete or not)."""
    names = [SINGLE, PICKLED_SINGLE, PICKLED_INDEX]
    return any((directory / name).is_file() for name in names) or bool(list(directory.glob("model-*.safetensors")))


def stray_shards(directory: Path, shards: set[Path]) -> list[str]:
    """Weight files in the directory that the index does not name: left over, and not copied."""
    others = (path for path in directory.glob("*.safetensors") if path not in shards)
    return sorted(path.name for path in others if not ADAPTER_FILE.fullmatch(path.name))


def adapter_files(directory: Path) -> list[str]:
    """Files of an adapter that lie beside a model's own weights: another form of weights, which is left alone."""
    return sorted(path.name for path in directory.iterdir() if ADAPTER_FILE.fullmatch(path.name))


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
        f"{path}: is a link to {real}, outside the checkpoint",
        hint="if you trust the link, use --allow-links; or copy the files: cp -rL FOLDER COPY",
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
