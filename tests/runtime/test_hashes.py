"""Whatever a stage writes, the output's record names every file with its sha256."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from shortstack.runtime.atomic_output import published
from shortstack.runtime.hashes import file_sha256
from tests.kills import recorded_hashes


@pytest.mark.fault(107)
def test_what_a_stage_did_not_hash_is_hashed_when_it_is_published(tmp_path: Path) -> None:
    with published(tmp_path / "out") as stage:
        (stage / "inner").mkdir()
        (stage / "inner/a.txt").write_text("a")
        (stage / "b.bin").write_bytes(b"b" * 5_000_000)
        given = hashlib.sha256(b"b" * 5_000_000).hexdigest()
        record = {"schema": 1, "files": {"b.bin": given, "gone.txt": "0"}, "mass": float("inf")}
        (stage / "shortstack.json").write_text(json.dumps(record))
    assert recorded_hashes(tmp_path / "out").keys() == {"b.bin", "inner/a.txt"}
    assert json.loads((tmp_path / "out/shortstack.json").read_text())["schema"] == 1


def test_a_directory_without_a_record_gets_none(tmp_path: Path) -> None:
    with published(tmp_path / "out") as stage:
        (stage / "a").write_text("a")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]


def test_a_file_is_hashed_piece_by_piece(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(9_000_000))
    pieces: list[int] = []
    assert file_sha256(tmp_path / "f", pieces.append) == hashlib.sha256(bytes(9_000_000)).hexdigest()
    assert sum(pieces) == 9_000_000
    assert max(pieces) < 9_000_000
