from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from shortstack.checkpoint.gguf import Gguf
from shortstack.errors import ShortstackError
from tests import gguf as writing

METADATA = {
    "general.architecture": "llama", "general.alignment": 64, "truth": True, "epsilon": 0.5, "large": 1 << 40,
    "words": ["a", "größer"], "kinds": [1, -3],
}  # fmt: skip
VALUES = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)


def opened(path: Path) -> Gguf:
    return Gguf(io.BytesIO(path.read_bytes()), path.name)


def test_metadata_and_shapes(tmp_path: Path) -> None:
    tensors = {"one": ("F32", VALUES), "vector": ("F16", VALUES[0])}
    found = opened(writing.write(tmp_path / "m.gguf", METADATA, tensors, version=2))
    assert found.metadata == METADATA
    assert {name: tensor.shape for name, tensor in found.tensors.items()} == {"one": (6, 64), "vector": (64,)}
    assert all(tensor.start % 64 == 0 for tensor in found.tensors.values())


@pytest.mark.parametrize(
    ("kind", "error"), [("F32", 0), ("F16", 1e-3), ("BF16", 1e-2), ("Q8_0", 1e-2), ("Q4_0", 0.12), ("Q4_1", 0.12)]
)
def test_values_are_within_the_rounding_of_their_type(kind: str, error: float, tmp_path: Path) -> None:
    found = opened(writing.write(tmp_path / "m.gguf", {}, {"odd": ("F32", VALUES[:1, :3]), "one": (kind, VALUES)}))
    values = found.values("one")
    assert values.dtype == np.float32
    # Steps are a share of the largest value of 32; bfloat16 and float16 of each value itself.
    assert np.abs(values - VALUES).max() <= error * np.abs(VALUES).max()
    assert np.array_equal(found.values("odd"), VALUES[:1, :3])  # any order


def test_blocks_of_four_bits_hold_their_low_halves_first(tmp_path: Path) -> None:
    exact = (np.arange(32, dtype=np.float32) % 15 - 7).reshape(1, 32)
    found = opened(writing.write(tmp_path / "m.gguf", {}, {"one": ("Q4_0", exact)}))
    assert np.array_equal(found.values("one"), exact)


def test_what_is_no_gguf_or_is_broken_is_named(tmp_path: Path) -> None:
    path = writing.write(tmp_path / "m.gguf", {"general.architecture": "llama"}, {"one": ("Q8_0", VALUES)})
    whole = path.read_bytes()
    cases = {
        "not a GGUF file": b"\x89PNG" + whole[4:],
        "GGUF version 9, expected 2 or 3": whole[:4] + b"\x09\0\0\0" + whole[8:],
        "m.gguf: ends at byte 40": whole[:40],
        "a text of": whole[:24] + b"\xff" * 8 + whole[32:],
        "unknown type": whole[:24] + whole[24:].replace(b"architecture\x08", b"architecture\x63", 1),
    }
    for message, data in cases.items():
        path.write_bytes(data)
        with pytest.raises(ShortstackError, match=message):
            opened(path)


def test_a_tensor_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = writing.write(tmp_path / "m.gguf", {}, {"one": ("F32", VALUES)})
    found = Gguf(io.BytesIO(path.read_bytes()[:-8]), "m.gguf")
    with pytest.raises(ShortstackError, match=r"m\.gguf: ends at byte"):
        found.values("one")
    for file, values, kind, message in (
        ("unknown", VALUES, 12, "GGML type 12, which is not read here"),
        ("odd", VALUES[:1, :5], 8, "no whole number of blocks of 32 weights"),
    ):
        path = writing.write(tmp_path / file, {}, {"one": ("F32", values)})
        raw = path.read_bytes()
        place = raw.index(b"one") + len(b"one") + 4 + 16  # behind the number of axes and two of them
        path.write_bytes(raw[:place] + kind.to_bytes(4, "little") + raw[place + 4 :])
        with pytest.raises(ShortstackError, match=message):
            opened(path).values("one")
