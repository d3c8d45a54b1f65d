"""Stored tensors by positioned reads, through the page cache and past it."""

from __future__ import annotations

import errno
import mmap
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import shortstack
from shortstack.checkpoint.headers import TensorInfo, read_header
from shortstack.engine import storage as reading
from shortstack.engine import streamed
from shortstack.engine.storage import Buffer, OpenFiles
from shortstack.errors import ShortstackError
from shortstack.runtime.memory import installed_bytes, is_out_of_memory, libc
from tests import pico

Built = Callable[..., Path]


def forget(path: Path) -> None:
    """Out of the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_share(path: Path) -> float:
    """How much of it is in the page cache."""
    import ctypes

    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
    address = torch.frombuffer(mapped, dtype=torch.uint8).data_ptr()
    assert libc().mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), pages) == 0
    return sum(page & 1 for page in pages) / len(pages)


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor], list[TensorInfo]]:
    """A file that is not in the page cache: of megabytes, with tensors of every length, one of no numbers, a gap between."""
    if sys.platform != "linux":
        pytest.skip("direct I/O as it is on Linux")
    path = tmp_path / "some.safetensors"
    shapes = {"a": (3,), "b": (700, 301), "c": (0, 4), "d": (1,), "gap": (1000,), "e": (511, 1024), "f": (77,)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    tensors["whole"] = torch.arange(9)
    tensors["half"] = torch.randn(2000, 33).bfloat16()
    save_file(tensors, path)
    forget(path)
    if cached_share(path) > 0:
        pytest.skip("this file system keeps its files in the page cache")
    infos = [info for info in read_header(path)[0] if info.name != "gap"]
    return path, {info.name: tensors[info.name] for info in infos}, infos


def filled(tensors: Sequence[TensorInfo], *, past_cache: bool) -> dict[str, torch.Tensor]:
    files = OpenFiles(past_cache=past_cache)
    try:
        return Buffer(files.buffer_bytes(tensors)).fill(tensors, files)
    finally:
        files.close()


@pytest.mark.parametrize("past_cache", [False, True])
def test_tensors_are_those_of_the_file(stored: Any, past_cache: bool) -> None:
    _, expected, infos = stored
    found = filled(infos, past_cache=past_cache)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_what_is_read_past_the_cache_is_not_brought_there(stored: Any) -> None:
    path, _, infos = stored
    filled(infos, past_cache=True)
    assert cached_share(path) < 0.1  # the pages that it looked for
    filled(infos, past_cache=False)
    assert cached_share(path) > 0.9


def test_what_the_cache_holds_is_read_from_there(stored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path, expected, infos = stored
    path.read_bytes()
    monkeypatch.setattr(OpenFiles, "_read_past_cache", lambda *_: pytest.fail("read from the disk"))
    found = filled(infos, past_cache=True)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_tensors_that_lie_together_are_read_at_once(stored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = os.preadv

    def preadv(descriptor: int, buffers: Sequence[Any], offset: int, *flags: int) -> int:
        count = real(descriptor, buffers, offset, *flags)
        calls.append(count)
        return count

    monkeypatch.setattr(reading.os, "preadv", preadv)
    _, expected, infos = stored
    spans = OpenFiles(past_cache=True).spans(infos)
    assert [tensor.name for span in spans for tensor in span.tensors] == [info.name for info in infos]
    assert len(spans) <= 3  # one gap; a span of its own for what lies where its numbers cannot be used
    filled(infos, past_cache=True)
    assert max(calls) > expected["b"].nbytes


@pytest.mark.parametrize("fails", ["open", "read"])
def test_a_file_system_without_direct_reads(stored: Any, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    path, expected, infos = stored
    real_open, real_read, direct = os.open, os.preadv, set()

    def refused(where: Path | str, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_DIRECT and fails == "open":
            raise OSError(errno.EINVAL, "Invalid argument")
        descriptor = real_open(where, flags, *rest, **more)
        if flags & os.O_DIRECT:
            direct.add(descriptor)
        return descriptor

    def read(descriptor: int, buffers: Sequence[Any], offset: int, *flags: int) -> int:
        if descriptor in direct:
            direct.discard(descriptor)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_read(descriptor, buffers, offset, *flags)

    monkeypatch.setattr(reading.os, "open", refused)
    monkeypatch.setattr(reading.os, "preadv", read)
    found = filled(infos, past_cache=True)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert cached_share(path) > 0.9


def test_other_faults_of_the_disk_are_told(stored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv

    def read(descriptor: int, buffers: Sequence[Any], offset: int, *flags: int) -> int:
        if not flags:
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, buffers, offset, *flags)

    monkeypatch.setattr(reading.os, "preadv", read)
    with pytest.raises(OSError, match="Input/output error"):
        filled(stored[2], past_cache=True)


def test_no_memory_for_a_buffer_is_what_torch_says_of_it() -> None:
    with pytest.raises(RuntimeError) as caught:
        Buffer(1 << 60)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize("left", [4096 * 100, 4096 * 100 + 17])
def test_a_file_that_was_cut_meanwhile(stored: Any, left: int) -> None:
    path, _, infos = stored
    os.truncate(path, left)
    forget(path)
    with pytest.raises(ShortstackError, match=rf"some.safetensors: ended at byte {left} while it was read"):
        filled(infos, past_cache=True)


def test_scores_past_the_cache_are_the_scores(copied: Built, windows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a checkpoint larger than half of the memory; also where a header ends at an odd byte, and weights with it."""
    model = copied("llama")
    path = model / "model.safetensors"
    read_past: list[str] = []
    real = OpenFiles._read_past_cache

    def counted(self: OpenFiles, span: reading.Span, pages: memoryview) -> int:
        read_past.append(span.tensors[0].name)
        return real(self, span, pages)

    def scores() -> dict[str, tuple[float, ...]]:
        scored = shortstack.score(str(model), data=str(windows), criterion="ppl,taylor", memory="streamed", quiet=True)
        return {name: found.scores for name, found in scored.criteria.items()}

    monkeypatch.setattr(OpenFiles, "_read_past_cache", counted)
    monkeypatch.setattr(OpenFiles, "_is_cached", lambda *_: False)  # a small file is, after a look at its header
    expected = scores()
    assert not read_past
    monkeypatch.setattr(streamed, "_CACHED_SHARE", 0.0)
    found = scores()
    assert read_past
    for name in expected:
        assert found[name] == pytest.approx(expected[name], rel=1e-6)
    pico.end_header_at_an_odd_byte(path)
    assert scores() == expected


@pytest.mark.parametrize(("device", "more", "past"), [("cpu", 1, True), ("cpu", 0, False), ("cuda", 1, False)])
def test_half_of_the_memory_decides(device: str, more: int, past: bool) -> None:
    """And a GPU's host has the time to read through the cache."""
    checkpoint = SimpleNamespace(nbytes=installed_bytes() // 2 + more)
    skeleton: Any = SimpleNamespace(device=torch.device(device), checkpoint=checkpoint)
    assert streamed._too_large_to_stay(skeleton) == past
