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


def test_read_back_sees_what_the_disk_did_not_keep(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite

    def lossy(descriptor: int, data: Any, offset: int) -> int:
        changed = bytearray(data)
        if offset > 5000:
            changed[0] ^= 1
        return real(descriptor, changed, offset)

    monkeypatch.setattr(os, "pwrite", lossy)
    with pytest.raises(ShortstackError, match="read back is not what was written"):
        copy_all(built("llama"), tmp_path / "x.safetensors")


@pytest.mark.fault(59)
def test_a_source_that_changes_meanwhile(copied: Built, tmp_path: Path) -> None:
    model = copied("llama")
    copies = [TensorCopy(tensor, tensor.name) for tensor in open_checkpoint(model).tensors.values()]

    def touch(_: int) -> None:
        os.utime(model / "model.safetensors", ns=(1, 1))

    with pytest.raises(ShortstackError, match="was changed while it was read"):
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
