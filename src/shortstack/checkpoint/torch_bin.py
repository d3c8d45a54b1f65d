"""Read what a `.bin` checkpoint holds (LLaMA-1 and Vicuna are such): names, shapes and where the bytes lie.

The one file here that imports torch, and only when it is used. The pickle is read under `weights_only`, which knows
tensors and plain containers and nothing else: no code in it can run. No tensor is loaded: torch gives the offset of each
storage in the file, so that tensors are read and copied by position, as those of safetensors are.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

from shortstack.checkpoint.headers import DTYPE_BITS, TensorInfo
from shortstack.errors import ShortstackError, first_line
from shortstack.runtime.private_names import fake_tensors, place_in_file

_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip


def read_pickled(path: Path) -> tuple[list[TensorInfo], dict[str, str]]:
    """Tensors of one file in the order of their bytes, and metadata as a safetensors file of it would have.

    Raises:
        ShortstackError: truncated, not written by torch.save, or holds anything but tensors.
    """
    _check_archive(path)
    size = path.stat().st_size
    tensors = [_located(path, size, name, value) for name, value in _state_dict(path).items()]
    return sorted(tensors, key=lambda tensor: (tensor.start, tensor.name)), {"format": "pt"}


def _check_archive(path: Path) -> None:
    with path.open("rb") as stream:
        start = stream.read(64)
    if not start:
        raise ShortstackError(f"{path}: is empty (0 bytes)", hint="download the file again")
    if start.startswith(b"version https://git-lfs"):
        raise ShortstackError(f"{path}: is a Git-LFS pointer, not the weights", hint="run: git lfs pull")
    if not start.startswith(b"PK"):
        raise ShortstackError(
            f"{path}: not a file that torch.save writes since torch 1.6 (starts {start[:8]!r})",
            hint="load it with torch and save it again",
        )
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise ShortstackError(f"{path}: truncated or damaged ({error})", hint="download the file again") from None
    if packed:
        raise ShortstackError(f"{path}: {packed[0]!r} in it is compressed, which torch.save never does")


def _state_dict(path: Path) -> dict[str, Any]:
    import torch

    try:
        with fake_tensors():
            loaded = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        named = [part for part in str(error).split() if part.count(".") and part.startswith(("GLOBAL", "__"))]
        what = f" ({named[0]})" if named else ""
        raise ShortstackError(
            f"{path}: holds other objects than tensors{what}; it was not loaded, and no code in it was run",
            hint="get the checkpoint as safetensors, or from a source that you trust",
        ) from None
    except (RuntimeError, ValueError, EOFError, KeyError, AttributeError, TypeError, OSError) as error:
        raise ShortstackError(f"{path}: cannot be read ({first_line(error)})", hint="download the file again") from None
    nested = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(nested, dict) or not nested:
        raise ShortstackError(f"{path}: holds no tensors by name", hint="save the output of model.state_dict()")
    for name, value in nested.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ShortstackError(f"{path}: {name!r} is a {type(value).__name__}, expected a tensor")
    return nested


def _located(path: Path, size: int, name: str, value: Any) -> TensorInfo:
    dtype = _DTYPES.get(str(value.dtype).removeprefix("torch."))
    if dtype is None or str(value.layout) != "torch.strided":
        raise ShortstackError(f"{path}: tensor {name!r} is {value.dtype}, which safetensors does not support")
    if not value.is_contiguous():
        raise ShortstackError(
            f"{path}: tensor {name!r} is a strided view, whose bytes are not contiguous",
            hint="load it with torch, make it contiguous and save it again",
        )
    element = DTYPE_BITS[dtype] // 8
    start = place_in_file(value) + value.storage_offset() * element
    nbytes = value.numel() * element
    if start + nbytes > size:
        raise ShortstackError(f"{path}: truncated: tensor {name!r} ends at byte {start + nbytes}, the file has {size}")
    return TensorInfo(name, dtype, tuple(value.shape), path, start, nbytes)
