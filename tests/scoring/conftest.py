"""What tests of scoring share: the ways in which a model is held."""

from __future__ import annotations

from typing import Any

import pytest

from shortstack.engine import select
from shortstack.engine.block_model import NotSeparableError


@pytest.fixture(params=["streamed", "resident", "whole"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The value of `memory`; the third time, of a model that must be held whole."""
    if request.param != "whole":
        return request.param

    def refuse(checkpoint: Any, *_: Any) -> Any:
        raise NotSeparableError(checkpoint.source, "a test holds it whole")

    monkeypatch.setattr(select, "_streamed", refuse)
    return "auto"
