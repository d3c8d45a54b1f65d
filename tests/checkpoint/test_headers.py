"""The own parser of safetensors headers: it accepts what the reference implementation writes and nothing broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from shortstack.checkpoint.headers import read_header, write_header
from shortstack.errors import ShortstackError


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.fault(9)
def test_reads_what_the_reference_writes(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5).to(torch.bfloat16), "empty": torch.zeros(0, 2)}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    found, metadata = read_header(path)
    assert metadata == {"format": "pt"}
    data = path.read_bytes()
    for tensor in found:
        expected = tensors[tensor.name]
        assert tensor.shape == tuple(expected.shape)
        assert data[tensor.start : tensor.start + tensor.nbytes] == expected.view(torch.uint8).numpy().tobytes()


def test_the_reference_reads_what_it_writes(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5)}
    path, copy = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    save_file(tensors, path)
    found, _ = read_header(path)
    data = path.read_bytes()
    body = b"".join(data[t.start : t.start + t.nbytes] for t in found)
    copy.write_bytes(write_header(found, {"format": "pt"}) + body)
    for name, tensor in load_file(copy).items():
        assert torch.equal(tensor, tensors[name])


BAD = {
    "empty": (b"", "is empty .0 bytes."),
    "short": (b"\x01\x00\x00", "too short"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "Git-LFS pointer"),
    "html": (b"<!DOCTYPE html><html><body>Not found</body></html>", "starts '<!DOCTYPE ht"),
    "huge": (raw({}, length=2**63), "not a safetensors file"),
    "over the limit": (raw({}, length=101_000_000), "not a safetensors file"),
    "truncated header": (raw({}, length=5000), "truncated: has 10 bytes, expected at least 5008"),
    "truncated data": (raw({"a": entry(0, 16, [4])}, b"\0" * 12), "truncated"),
    "trailing": (raw({"a": entry(0, 16, [4])}, b"\0" * 20), "4 bytes after the last tensor"),
    "overlap": (raw({"a": entry(0, 16, [4]), "b": entry(8, 24, [4])}, b"\0" * 24), "overlaps"),
    "hole": (raw({"a": entry(0, 16, [4]), "b": entry(20, 36, [4])}, b"\0" * 36), "leaves a hole"),
    "negative": (raw({"a": entry(-16, 0, [4])}, b""), "whole numbers"),
    "size": (raw({"a": entry(0, 16, [5])}, b"\0" * 16), r"takes 20 bytes, the header gives it 16"),
    "overflow": (raw({"a": entry(0, 16, [2**62, 2**62])}, b"\0" * 16), "the header gives it 16"),
    "dtype": (raw({"a": entry(0, 16, [4], "F128")}, b"\0" * 16), "unknown dtype 'F128'"),
    "not JSON": (raw(b"{nonsense"), "not valid JSON"),
    "not an object": (raw([1, 2]), "not a JSON object"),
    "twice": (raw(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}'), "names 'a' twice"),
    "no entry": (raw({"a": {"dtype": "F32"}}), "lacks dtype, shape or data_offsets"),
    "deep": (raw(b"[" * 100_000), "not valid JSON"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.fault(1, 2, 3, 4, 5, 6, 7, 8)
def test_broken_files_are_refused_by_name(tmp_path: Path, case: str) -> None:
    data, message = BAD[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(ShortstackError, match=message) as caught:
        read_header(path)
    assert str(path) in caught.value.message


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_change_of_a_byte_is_refused_or_read_as_the_reference_reads_it(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2, 2), "bb": torch.ones(3)}, path)
    content = bytearray(path.read_bytes())
    header_end = 8 + int.from_bytes(content[:8], "little")
    position = data.draw(st.integers(0, header_end - 1))
    content[position] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        found, _ = read_header(path)
    except ShortstackError:
        return
    try:
        with safe_open(path, "pt") as file:
            assert {t.name: list(t.shape) for t in found} == {
                name: file.get_slice(name).get_shape() for name in file.keys()
            }
    except SafetensorError as error:  # the reference knows fewer dtypes or refuses more names; never a wrong size
        assert "offset" not in str(error).lower()
