"""How long blocks are trained: on no more text than there is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shortstack.errors import ShortstackError

Retrained = Callable[..., Any]


def test_text_that_is_shorter_than_requested_is_refused(retrained: Retrained, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(ShortstackError, match=r"--tokens 1000000: .*text\.jsonl holds \d+ tokens to train on") as error:
        retrained("local", tmp_path / "out", tokens="1M")
    assert "--epochs N" in error.value.hint
    with pytest.raises(ShortstackError, match=r"rows\.json holds \d+ tokens"):
        retrained("local", tmp_path / "out", data=str(rows), seq_len=400, tokens="1M")
    found = retrained("local", tmp_path / "out", tokens=None, dry_run=True)  # without it, all of a short text
    assert 15_000 < found.tokens < 25_000
