"""How many levels lie between a command and a block, which room imports which, and how long a file may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts import rooms, trace_files

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_eleven_frames_from_score_to_a_block(tmp_path: Path) -> None:
    trace_files.make_inputs(tmp_path)
    found = trace_files.traced("score", ROOT, tmp_path)
    assert found["stack"][0] == "score"
    assert 3 <= found["frames"] <= 11, found["stack"]


def test_no_file_has_more_than_400_lines() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in (ROOT / "src").rglob("*.py")}
    assert {str(path): lines for path, lines in lengths.items() if lines > 400} == {}


def imports() -> Iterator[tuple[str, str, str]]:
    """(room, a room that it imports, the file)."""
    source = ROOT / "src/shortstack"
    for path in source.rglob("*.py"):
        parts = path.relative_to(source).parts
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("shortstack."):
                yield parts[0].removesuffix(".py"), str(node.module).split(".")[1], "/".join(parts)


def test_rooms_import_what_lies_below_them_as_the_picture_shows() -> None:
    levels = rooms.level_of()
    folders = {path.parent.name for path in (ROOT / "src/shortstack").glob("*/__init__.py")}
    assert set(levels) == folders | {"registry"}
    upwards = {
        (room, other, file)
        for room, other, file in imports()
        if room in levels and other in levels and levels[other] < levels[room]
    }
    assert {found for found in upwards if found[:2] not in rooms.UPWARDS} == set()
    assert {found[:2] for found in upwards} == rooms.UPWARDS
