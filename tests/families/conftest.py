from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny checkpoints by name, built once per test process. They must not be changed."""
    from tests.families import tiny

    known: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in known:
            known[name] = tiny.build(tmp_path_factory.mktemp("tiny"), name)
        return known[name]

    return get
