"""What tests of pruning share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import pico


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Six windows of 16 tokens, as rows of a file: the first half chooses, the second judges."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"input_ids": window}) + "\n" for window in pico.windows(6)))
    return str(path)
