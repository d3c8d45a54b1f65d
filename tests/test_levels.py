"""How many levels lie between a command and a block, and how long a file may be."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import trace_files

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_nine_frames_from_score_to_a_block(tmp_path: Path) -> None:
    trace_files.make_inputs(tmp_path)
    found = trace_files.traced("score", ROOT, tmp_path)
    assert found["stack"][0] == "score"
    assert 3 <= found["frames"] <= 9, found["stack"]


def test_no_file_has_more_than_400_lines() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in (ROOT / "src").rglob("*.py")}
    assert {str(path): lines for path, lines in lengths.items() if lines > 400} == {}
