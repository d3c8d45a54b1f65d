"""A whole command whose file shrinks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Built = Callable[..., Path]

# Scores a model whose file is cut to nothing while a block is at work, and the others are still to be read.
SHRINKING = """
import os, sys
from shortstack.engine.block_model import Skeleton
from shortstack.__main__ import main
real, seen = Skeleton.run_block, []
def run_block(self, block, *rest):
    if block not in seen:
        seen.append(block)
    if len(seen) == 2:
        os.truncate(sys.argv[2] + "/model.safetensors", 0)
    return real(self, block, *rest)
Skeleton.run_block = run_block
main()
"""


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
