"""The lock beside an output, on a disk that is full."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from shortstack.errors import ShortstackError
from shortstack.runtime.atomic_output import locked


@pytest.mark.fault(118)
def test_a_disk_too_full_for_the_lock_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ShortstackError, match="could not be written .no space left") as refused, locked(tmp_path / "o"):
        pass
    assert refused.value.hint == "make room, then run it again"
    assert list(tmp_path.iterdir()) == []
