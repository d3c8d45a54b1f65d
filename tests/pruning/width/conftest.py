"""Windows for width pruning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import pico


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Windows of token ids that every tiny vocabulary has."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    windows = pico.windows(4, 16, vocabulary=90)
    path.write_text("".join(json.dumps({"input_ids": window}) + "\n" for window in windows))
    return path
