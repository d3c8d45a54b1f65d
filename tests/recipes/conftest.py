from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.recipes.runs import RECIPE
from tests.retraining.material import texts

Built = Callable[..., Path]


@pytest.fixture
def recipe(built: Built, tmp_path: Path) -> Path:
    text = texts(tmp_path / "text.jsonl")
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE.format(model=built("llama"), text=text))
    return path
