"""Block by block where the cut is at an end of the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shortstack.pruning.prune import prune


@pytest.mark.parametrize(("removed", "beside"), [("0,1", 2), ("4,5", 3)], ids=["the first blocks", "the last blocks"])
def test_the_block_beside_a_cut_at_an_end_comes_nearer(
    removed: str, beside: int, dense: Path, retrained: Callable[..., Any], tmp_path: Path
) -> None:
    prune(str(dense), blocks=removed, out=tmp_path / "p", quiet=True)
    retrained("local", tmp_path / "out", tmp_path / "p", tokens="2K", epochs=2)
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    ends = [line for line in lines if "validation" in line]
    assert [line["block"] for line in ends] == [beside]
    assert all(line["validation"] < line["validation_before"] for line in ends)
    record = json.loads((tmp_path / "out/shortstack.json").read_text())
    assert record["steps"][-1]["trained_blocks"] == [line["block"] for line in ends]
