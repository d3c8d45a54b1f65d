"""Promises of size that only a process of its own can show."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Built = Callable[..., Path]
# A child's peak memory starts from its parent's: a small process stands in between.
LAUNCHER = (
    "import json, os, subprocess, sys; p = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)\n"
    "_, status, usage = os.wait4(p.pid, 0); print(json.dumps([os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024]))"
)
WIDE = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
BLOCK_BYTES = 4 * (4 * 512 * 512 + 3 * 512 * 1408)


def peak(*arguments: str) -> int:
    done = subprocess.run([sys.executable, "-c", LAUNCHER, *arguments], capture_output=True, text=True, check=True)
    code, peak_bytes = json.loads(done.stdout)
    assert code == 0, done.stderr
    return int(peak_bytes)


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests import pico

    path = tmp_path_factory.mktemp("w") / "windows.jsonl"
    path.write_text("".join(json.dumps({"input_ids": window}) + "\n" for window in pico.windows(10, 16)))
    return path


def test_scoring_never_holds_the_model(built: Built, windows: Path) -> None:
    """Promise 3: twenty more blocks of 13 MB add their streams and little else."""

    def scored(depth: int) -> int:
        model = built("llama", num_hidden_layers=depth, **WIDE)
        arguments = ["score", str(model), "--data", str(windows), "--criterion", "ppl,taylor", "--memory", "streamed"]
        return peak(sys.executable, "-m", "shortstack", *arguments, "--quiet")

    streams = 2 * 20 * 10 * 16 * 512 * 4
    assert scored(24) - scored(4) < streams + 3 * BLOCK_BYTES < 0.3 * 20 * BLOCK_BYTES


def test_pruning_holds_a_few_megabytes(built: Built, tmp_path: Path) -> None:
    model = built("llama", num_hidden_layers=24, **WIDE)
    used = peak(sys.executable, "-m", "shortstack", "prune", str(model), "--blocks", "1", "--out", str(tmp_path / "p"))
    assert used < 100_000_000 < (model / "model.safetensors").stat().st_size
