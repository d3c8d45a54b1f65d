"""Programs of others in environments of their own, for tests marked `engine`: found, or the test is skipped and says why."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

# A folder with an environment per program: convert, llama, vllm, mergekit.
FOLDER = Path(os.environ.get("SHORTSTACK_ENGINES", Path(__file__).resolve().parents[1] / ".engines")).absolute()


def environment_of(name: str) -> Path:
    """The environment of one of them."""
    found = FOLDER / name
    if not (found / "bin/python").exists():
        pytest.skip(f"no environment {name} in {FOLDER} (SHORTSTACK_ENGINES)")
    return found


def converter_python() -> Path:
    """The Python of an environment with llama.cpp's converter."""
    own = os.environ.get("SHORTSTACK_CONVERTER_PYTHON")
    return Path(own) if own else environment_of("convert") / "bin/python"


def ran(program: Path, *arguments: str | Path) -> str:
    """Run one of them to its end; what it printed."""
    done = subprocess.run(
        [program, *arguments], capture_output=True, text=True, timeout=600, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
