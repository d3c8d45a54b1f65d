"""The lock beside an output, on a disk that is full."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from shortstack.errors import ShortstackError
from shortstack.runtime.atomic_output import locked, published


@pytest.mark.fault(118)
def test_a_disk_too_full_for_the_lock_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ShortstackError, match="could not be written .no space left") as refused, locked(tmp_path / "o"):
        pass
    assert refused.value.hint == "free some disk space, then run the command again"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_weights_have_the_rights_of_any_new_file(tmp_path: Path, mask: int) -> None:
    """Libraries that write by a temporary file leave 0600: nobody else on a machine could read the model."""
    before = os.umask(mask)
    try:
        with published(tmp_path / "out") as stage:
            (stage / "part").mkdir()
            for name in ("model.safetensors", "part/adapter_model.safetensors"):
                (stage / name).write_bytes(b"x")
                (stage / name).chmod(0o600)
        (tmp_path / "any").write_bytes(b"x")
    finally:
        os.umask(before)
    expected = (tmp_path / "any").stat().st_mode
    assert (tmp_path / "out/model.safetensors").stat().st_mode == expected
    assert (tmp_path / "out/part/adapter_model.safetensors").stat().st_mode == expected
