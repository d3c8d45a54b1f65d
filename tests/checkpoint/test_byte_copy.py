"""Copying: hashed, checked, read back."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shortstack.checkpoint import byte_copy as copying
from shortstack.checkpoint import pieces
from shortstack.checkpoint.byte_copy import TensorCopy, copy_tensors, new_header
from shortstack.errors import ShortstackError
from shortstack.families.open_model import open_checkpoint
from shortstack.runtime.atomic_output import write_file

Built = Callable[..., Path]


def copy_all(model: Path, target: Path) -> str:
    copies = [TensorCopy(tensor, tensor.name) for tensor in open_checkpoint(model).tensors.values()]
    return copy_tensors(copies, target, header=new_header(copies, {"format": "pt"}))


def test_the_digest_is_that_of_the_file(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With pieces and flushes so small that tensors are cut and parts are read back while others are written."""
    for module in (copying, pieces):
        monkeypatch.setattr(module, "PIECE", 1000)
    monkeypatch.setattr(copying, "_SYNC_EVERY", 4096)
    digest = copy_all(built("llama"), tmp_path / "x.safetensors")
    assert digest == hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()


def one_bit(data: bytearray) -> None:
    data[len(data) // 2] ^= 1


def two_words_exchanged(data: bytearray) -> None:
    """What a sum of the words would not see."""
    data[0:8], data[8:16] = data[8:16], data[0:8]


def all_zeros(data: bytearray) -> None:
    data[:] = bytes(len(data))


@pytest.mark.parametrize("damage", [one_bit, two_words_exchanged, all_zeros])
def test_read_back_sees_what_the_disk_did_not_keep(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytearray], None]
) -> None:
    """One write of many is damaged on its way, and in just one place."""
    for module in (copying, pieces):
        monkeypatch.setattr(module, "PIECE", 1000)
    real = os.pwrite
    damaged: list[bool] = []

    def lossy(descriptor: int, data: Any, offset: int) -> int:
        changed = bytearray(data)
        if offset > 20_000 and not damaged and len(changed) > 100:
            damage(changed)
            damaged.append(changed != data)
        return real(descriptor, changed, offset)

    monkeypatch.setattr(os, "pwrite", lossy)
    with pytest.raises(ShortstackError, match="read back other bytes than were written, from byte"):
        copy_all(built("llama"), tmp_path / "x.safetensors")
    assert damaged == [True]


def test_a_bit_that_flips_in_memory_while_it_waits_is_seen(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the check of a piece and its way to the disk: what is hashed and written is wrong, and agrees."""

    def damaged(pipeline: copying._CopyPipeline) -> None:
        for number, sent in enumerate(iter(pipeline._sent.get, None)):
            if number == 2:
                sent[0][0] ^= 4
            pipeline.sha256.update(sent[0])
            pipeline._hashed.put(sent)

    monkeypatch.setattr(copying._CopyPipeline, "_hash_pieces", damaged)
    with pytest.raises(ShortstackError, match="read back other bytes than were written, from byte"):
        copy_all(built("llama"), tmp_path / "x.safetensors")


@pytest.mark.parametrize("size", [3, 4096, 5000, 64 << 10, (1 << 20) + 13])
def test_the_checksum_sees_what_disks_and_memory_do(size: int) -> None:
    data = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    made = {data.tobytes()}

    def add(parts: dict[int, bytes]) -> None:
        changed = bytearray(data.tobytes())
        for place, part in parts.items():
            changed[place : place + len(part)] = part
        made.add(bytes(changed))

    for place in range(0, size, max(1, size // 50)):
        add({place: bytes([data[place] ^ 1 << place % 8])})
    for length in (1, 8, 512, 4096):
        for start in (length, size - length):
            if size >= 2 * length:  # exchanged with what is next to it or at the end; or lost
                add({0: data[start : start + length].tobytes(), start: data[:length].tobytes()})
                add({start: bytes(length)})
    assert len(made) > min(size, 50)
    assert len({copying._checksum(memoryview(one)) for one in made}) == len(made)


@pytest.mark.fault(59)
def test_a_source_that_changes_meanwhile(copied: Built, tmp_path: Path) -> None:
    model = copied("llama")
    copies = [TensorCopy(tensor, tensor.name) for tensor in open_checkpoint(model).tensors.values()]

    def touch(_: int) -> None:
        os.utime(model / "model.safetensors", ns=(1, 1))

    with pytest.raises(ShortstackError, match="the file changed while it was read"):
        copy_tensors(copies, tmp_path / "x", header=new_header(copies, {}), progress=touch)


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_every_value_that_is_not_finite_is_seen(dtype: str, value: str) -> None:
    width, patterns = {
        "F64": (8, {"nan": 0x7FF8 << 48, "inf": 0x7FF0 << 48, "-inf": 0xFFF0 << 48}),
        "F32": (4, {"nan": 0x7FC00000, "inf": 0x7F800000, "-inf": 0xFF800000}),
        "F16": (2, {"nan": 0xFE01, "inf": 0x7C00, "-inf": 0xFC00}),
        "BF16": (2, {"nan": 0xFFC0, "inf": 0x7F80, "-inf": 0xFF80}),
    }[dtype]
    largest = {"F64": 0x7FEF << 48, "F32": 0xFF7FFFFF, "F16": 0xFBFF, "BF16": 0xFF7F}[dtype]
    words = np.full(1001, largest, dtype=f"u{width}")
    assert copying._all_finite(memoryview(words.tobytes()), dtype)
    words[500] = patterns[value]
    assert not copying._all_finite(memoryview(words.tobytes()), dtype)


@pytest.mark.fault(50)
def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep/folder/x.json"
    write_file(path, b"first")

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ShortstackError, match="no space left"):
        write_file(path, b"second")
    assert path.read_bytes() == b"first"
    assert [entry.name for entry in path.parent.iterdir()] == ["x.json"]
