"""Write GGUF files, for tests of what reads them: every kind of metadata, and tensors in the types that are read."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

# Ways to store a tensor: name -> GGML type.
KINDS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "BF16": 30}
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY, _UINT64 = 4, 5, 6, 7, 8, 9, 10


def write(
    path: Path, metadata: dict[str, Any], tensors: dict[str, tuple[str, np.ndarray]], *, version: int = 3
) -> Path:
    """A file with these tensors: name -> (how it is stored, its values)."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(_string(key) + _value(value) for key, value in metadata.items())
    alignment = metadata.get("general.alignment", 32)
    data = b""
    for name, (kind, values) in tensors.items():
        data += bytes(-len(data) % alignment)
        axes = values.shape[::-1]
        head += _string(name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, KINDS[kind], len(data))
        data += packed(kind, values)
    path.write_bytes(head + bytes(-len(head) % alignment) + data)
    return path


def packed(kind: str, values: np.ndarray) -> bytes:
    """The bytes of a tensor; in the block types values must be what such a block can hold, or they are rounded."""
    flat = values.astype(np.float32).reshape(-1)
    if kind in ("F32", "F16"):
        return flat.astype("<f4" if kind == "F32" else "<f2").tobytes()
    if kind == "BF16":
        return (flat.view(np.uint32) >> 16).astype("<u2").tobytes()
    blocks = flat.reshape(-1, 32)
    if kind == "Q8_0":
        scale = (np.abs(blocks).max(axis=1, keepdims=True) / 127).astype("<f2")
        return _rows(scale, np.rint(blocks / scale.astype(np.float32)).astype(np.int8))
    if kind == "Q4_0":
        scale = (np.abs(blocks).max(axis=1, keepdims=True) / 7).astype("<f2")
        return _rows(scale, _nibbles(np.rint(blocks / scale.astype(np.float32)) + 8))
    least = blocks.min(axis=1, keepdims=True).astype("<f2")
    scale = ((blocks.max(axis=1, keepdims=True) - least) / 15).astype("<f2")
    steps = np.rint((blocks - least.astype(np.float32)) / scale.astype(np.float32)).clip(0, 15)
    return _rows(scale, least, _nibbles(steps))


def _rows(*parts: np.ndarray) -> bytes:
    columns = [np.ascontiguousarray(part).view(np.uint8) for part in parts]
    return np.concatenate(columns, axis=1).tobytes()


def _nibbles(steps: np.ndarray) -> np.ndarray:
    whole = steps.astype(np.uint8)
    return whole[:, :16] | (whole[:, 16:] << 4)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    """A value with the type that llama.cpp gives its kind."""
    if isinstance(value, list):
        kind = _STRING if isinstance(value[0], str) else _INT32
        items = b"".join(_string(item) if kind == _STRING else struct.pack("<i", item) for item in value)
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + items
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    return struct.pack("<IQ", _UINT64, value) if value >= 1 << 32 else struct.pack("<II", _UINT32, value)
