"""Read a GGUF file, the format of llama.cpp: its metadata, and its tensors as float32. numpy alone, nothing is run.

The format: "GGUF", a version, two counts, then metadata (key, type, value) and tensors (name, shape with the fastest axis
first, type, offset), then, aligned, the data. Tensors are stored plainly, or in blocks of 32 weights with a scale.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from shortstack.errors import ShortstackError

if TYPE_CHECKING:
    import numpy as np

    Floats = np.ndarray[Any, np.dtype[np.float32]]
    Bytes = np.ndarray[Any, np.dtype[np.uint8]]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# Types of metadata values: struct's letter, for numbers and truth values.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LONGEST_STRING, _MOST_ITEMS, _MOST_AXES = 1 << 26, 1 << 26, 8
_ALIGNMENT = 32  # bytes, where the metadata does not say


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: its shape in the usual order (rows first), its GGML type, and where its bytes begin in the file."""

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


class Gguf:
    """An opened GGUF file.

    Attributes:
        place: what errors call it.
        metadata: by key, such as `general.architecture`.
        tensors: by name, in the order of the file.
    """

    def __init__(self, stream: BinaryIO, place: str) -> None:
        """Read everything but the tensors' values.

        Raises:
            ShortstackError: it is no GGUF file, or is broken.
        """
        self.place = place
        self._stream = stream
        self._position = 0
        if self._take(4) != MAGIC:
            raise ShortstackError(f"{place}: not a GGUF file (it does not start with 'GGUF')", hint="download it again")
        version = self._number("I")
        if version not in VERSIONS:
            raise ShortstackError(f"{place}: GGUF version {version}, expected 2 or 3", hint="convert the model again")
        tensors, entries = self._number("Q"), self._number("Q")
        self.metadata = {self._string(): self._value(self._number("I")) for _ in range(entries)}
        listed = [self._tensor() for _ in range(tensors)]
        alignment = self.metadata.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or alignment < 1:
            raise ShortstackError(f"{place}: general.alignment is {alignment!r}, expected a whole number >= 1")
        data = -(-self._position // alignment) * alignment
        self.tensors = {one.name: GgufTensor(one.name, one.shape, one.kind, data + one.start) for one in listed}

    def values(self, name: str) -> Floats:
        """The values of a tensor as float32.

        Raises:
            ShortstackError: it is stored in a type that is not read here, or the file ends before it does.
        """
        import numpy as np

        tensor = self.tensors[name]
        if tensor.kind not in _LAYOUTS:
            raise ShortstackError(
                f"{self.place}: tensor {name!r} has GGML type {tensor.kind}, which is not read here",
                hint=f"types {', '.join(map(str, sorted(_LAYOUTS)))} are: F32, F16, Q4_0, Q4_1, Q8_0, BF16",
            )
        layout, numel = _LAYOUTS[tensor.kind], tensor.numel
        if numel % layout.weights:
            raise ShortstackError(
                f"{self.place}: tensor {name!r} of shape {list(tensor.shape)} is no whole number of blocks of "
                f"{layout.weights} weights",
                hint="download it again",
            )
        if tensor.start != self._position:
            self._stream.seek(tensor.start)
            self._position = tensor.start
        raw = np.frombuffer(self._take(numel // layout.weights * layout.nbytes), dtype=np.uint8)
        return layout.read(raw).reshape(tensor.shape)

    def nbytes(self, name: str) -> int | None:
        """Bytes of a tensor; None where it is stored in a type that is not read here."""
        tensor = self.tensors[name]
        layout = _LAYOUTS.get(tensor.kind)
        return None if layout is None else tensor.numel // layout.weights * layout.nbytes

    def missing_bytes(self, length: int) -> int:
        """How many bytes of its tensors a file of this length lacks."""
        ends = (tensor.start + (self.nbytes(name) or 0) for name, tensor in self.tensors.items())
        return max(0, max(ends, default=0) - length)

    def _take(self, nbytes: int) -> bytes:
        data = self._stream.read(nbytes)
        if len(data) != nbytes:
            raise ShortstackError(
                f"{self.place}: ends at byte {self._position + len(data)}, {nbytes} bytes were expected from "
                f"{self._position} on",
                hint="download it again",
            )
        self._position += nbytes
        return data

    def _number(self, letter: str) -> Any:
        return struct.unpack(f"<{letter}", self._take(struct.calcsize(f"<{letter}")))[0]

    def _string(self) -> str:
        length = self._number("Q")
        self._check_size(length, _LONGEST_STRING, "text")
        return self._take(length).decode("utf-8", errors="replace")

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise ShortstackError(f"{self.place}: a metadata value of unknown type {kind}", hint="download it again")
        item, length = self._number("I"), self._number("Q")
        self._check_size(length, _MOST_ITEMS, "list")
        if item in _SCALARS:
            letter = f"<{length}{_SCALARS[item]}"
            return list(struct.unpack(letter, self._take(struct.calcsize(letter))))
        return [self._value(item) for _ in range(length)]

    def _tensor(self) -> GgufTensor:
        name = self._string()
        axes = self._number("I")
        self._check_size(axes, _MOST_AXES, "shape")
        shape = tuple(self._number("Q") for _ in range(axes))[::-1]
        return GgufTensor(name, shape, self._number("I"), self._number("Q"))

    def _check_size(self, length: int, most: int, what: str) -> None:
        if length > most:
            raise ShortstackError(
                f"{self.place}: a {what} of {length} parts near byte {self._position}", hint="download it again"
            )


def read_plain(dtype: str, raw: bytes | bytearray) -> Floats:
    """Numbers that are stored plainly, as float32: dtype `F32`, `F16` or `BF16`."""
    import numpy as np

    return {"F32": _f32, "F16": _f16, "BF16": _bf16}[dtype](np.frombuffer(raw, dtype=np.uint8))


@dataclass(frozen=True)
class _Layout:
    """How a GGML type is stored: weights and bytes of a block, and what makes float32 of blocks."""

    weights: int
    nbytes: int
    read: Callable[[Bytes], Floats]


def _f32(raw: Bytes) -> Floats:
    return raw.view("<f4")


def _f16(raw: Bytes) -> Floats:
    import numpy as np

    return raw.view("<f2").astype(np.float32)


def _bf16(raw: Bytes) -> Floats:
    import numpy as np

    return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _q4_0(raw: Bytes) -> Floats:
    """scale * (q - 8)."""
    import numpy as np

    blocks = raw.reshape(-1, 18)
    return _halves(blocks, 0) * (_nibbles(blocks[:, 2:]).astype(np.float32) - 8)


def _q4_1(raw: Bytes) -> Floats:
    """scale * q + least."""
    import numpy as np

    blocks = raw.reshape(-1, 20)
    return _halves(blocks, 0) * _nibbles(blocks[:, 4:]).astype(np.float32) + _halves(blocks, 2)


def _q8_0(raw: Bytes) -> Floats:
    """scale * q."""
    import numpy as np

    blocks = raw.reshape(-1, 34)
    return _halves(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _halves(blocks: Bytes, start: int) -> Floats:
    """The float16 at byte `start` of every block, as a column."""
    import numpy as np

    return blocks[:, start : start + 2].copy().view("<f2").astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """16 bytes hold 32 weights: all low halves come first."""
    import numpy as np

    return np.concatenate([packed & 15, packed >> 4], axis=1)


_LAYOUTS = {
    0: _Layout(1, 4, _f32),
    1: _Layout(1, 2, _f16),
    2: _Layout(32, 18, _q4_0),
    3: _Layout(32, 20, _q4_1),
    8: _Layout(32, 34, _q8_0),
    30: _Layout(1, 2, _bf16),
}
