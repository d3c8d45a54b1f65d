"""What tests of the engine share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import pico


@pytest.fixture
def windows(tmp_path: Path) -> Path:
    """Ten windows of 16 tokens, as a file."""
    path = tmp_path / "windows.jsonl"
    path.write_text("".join(json.dumps({"input_ids": window}) + "\n" for window in pico.windows(10, 16)))
    return path
