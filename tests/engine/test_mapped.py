"""Weights as pages of their file."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import shortstack
from shortstack.engine.mapped import MappedFiles
from shortstack.engine.storage import Buffer, OpenFiles
from shortstack.families.open_model import open_checkpoint
from shortstack.runtime.memory import libc
from tests import pico

Built = Callable[..., Path]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="files are mapped on Linux alone")

# Scores a model whose file is cut to nothing while its last block is at work: nothing is read any more.
SHRINKING = """
import os, sys
from shortstack.engine.block_model import Skeleton
from shortstack.__main__ import main
real, seen = Skeleton.run_block, []
def run_block(self, block, *rest):
    if block not in seen:
        seen.append(block)
    if len(seen) == 6:
        os.truncate(sys.argv[2] + "/model.safetensors", 0)
    return real(self, block, *rest)
Skeleton.run_block = run_block
main()
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mapped_and_read_give_the_same_bits(
    built: Built, windows: Path, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scores() -> dict[str, Any]:
        found = shortstack.score(
            str(built("llama")),
            data=str(windows),
            criterion="ppl,taylor,magnitude",
            memory="resident",
            dtype=dtype,
            quiet=True,
        )
        return {name: criterion.scores for name, criterion in found.criteria.items()}

    mapped, views = [], MappedFiles.views

    def noted(self: MappedFiles, *arguments: Any) -> Any:
        mapped.append(views(self, *arguments))
        return mapped[-1]

    monkeypatch.setattr(MappedFiles, "views", noted)
    by_pages = scores()
    assert mapped
    assert None not in mapped
    monkeypatch.setattr(MappedFiles, "views", lambda *_: None)
    assert scores() == by_pages


def test_tensors_are_those_of_the_file_and_pages_that_went_come_back(built: Built) -> None:
    checkpoint = open_checkpoint(built("llama"))
    tensors, files, reading = checkpoint.blocks[1], MappedFiles(), OpenFiles()
    found = files.views(tensors)
    read = Buffer(reading.buffer_bytes(tensors)).fill(tensors, reading)
    assert found is not None
    reading.close()
    files.release(tensors)
    assert all(torch.equal(found[name], read[name]) for name in read)
    files.close()
    assert all(torch.equal(found[name], read[name]) for name in read)  # tensors outlive the object


def test_what_is_written_to_a_tensor_does_not_reach_the_file(copied: Built) -> None:
    model = copied("llama")
    before = (model / "model.safetensors").read_bytes()
    files = MappedFiles()
    found = files.views(open_checkpoint(model).blocks[0])
    assert found is not None
    for tensor in found.values():
        tensor.zero_()
    files.close()
    assert (model / "model.safetensors").read_bytes() == before


def test_a_file_that_is_not_laid_out_for_it_is_read(copied: Built, windows: Path) -> None:
    """The header of this file ends at an odd byte, which the format allows."""
    model = copied("llama")
    expected = shortstack.score(str(model), data=str(windows), memory="resident", quiet=True).criteria["ppl"].scores
    pico.end_header_at_an_odd_byte(model / "model.safetensors")
    checkpoint = open_checkpoint(model)
    assert MappedFiles().views(checkpoint.blocks[0]) is None
    assert (
        shortstack.score(str(model), data=str(windows), memory="resident", quiet=True).criteria["ppl"].scores
        == expected
    )


@pytest.mark.fault(60)
def test_a_file_that_shrinks_under_a_run_is_an_error_in_words(copied: Built, windows: Path, tmp_path: Path) -> None:
    model, out = copied("llama", hidden_size=128, intermediate_size=512), tmp_path / "scores.json"
    arguments = ["score", str(model), "--data", str(windows), "--memory", "resident", "--out", str(out), "--quiet"]
    done = subprocess.run(
        [sys.executable, "-c", SHRINKING, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert [line.split(":")[0] for line in lines[-2:]] == ["error", "hint"]
    assert "model.safetensors" in lines[-2]
    assert "Traceback" not in done.stderr
    assert not out.exists()


def test_the_signal_is_handled_while_files_are_mapped_and_no_longer(built: Built) -> None:
    def handler() -> bytes:
        import ctypes

        found = ctypes.create_string_buffer(1024)
        libc().sigaction(signal.SIGBUS, None, found)
        return found.raw[:8]  # the function; what follows it is the system's

    before, tensors = handler(), open_checkpoint(built("llama")).blocks[0]
    first, second = MappedFiles(), MappedFiles()
    first.views(tensors)
    second.views(tensors)
    assert handler() != before
    first.close()
    assert handler() != before
    second.close()
    assert handler() == before
