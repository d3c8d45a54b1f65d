"""Outputs: absent or complete, whatever the disk does; and the input untouched."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shortstack.errors import ShortstackError
from shortstack.families.open_model import open_checkpoint
from shortstack.pruning.prune import prune
from shortstack.runtime import atomic_output as writer
from shortstack.runtime.atomic_output import locked, published
from shortstack.scoring.score import score

Built = Callable[..., Path]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.fault(49)
def test_a_full_disk_leaves_the_old_output(built: Built, tmp_path: Path) -> None:
    """--force replaces an output only by a complete one."""
    prune(str(built("llama")), out=tmp_path / "p", blocks="1", quiet=True)
    before = {path.name: path.read_bytes() for path in (tmp_path / "p").iterdir()}
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
        "from shortstack.cli.app import run; import sys; sys.exit(run(sys.argv[1:]))"
    )
    arguments = ["prune", str(built("llama")), "--out", str(tmp_path / "p"), "--blocks", "2", "--force"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 1
    assert "could not be written" in done.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "p").iterdir()} == before
    assert names(tmp_path) == ["p"]


@pytest.mark.fault(50)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
@pytest.mark.parametrize("nth", [1, 2, 5])
def test_every_nth_write_fails(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, nth: int
) -> None:
    from shortstack.checkpoint import byte_copy, pieces

    for module in (byte_copy, pieces):
        monkeypatch.setattr(module, "PIECE", 8192)
    real, count = os.pwrite, [0]

    def pwrite(*arguments: Any) -> int:
        count[0] += 1
        if count[0] == nth:
            raise OSError(code, os.strerror(code))
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", pwrite)
        with pytest.raises(ShortstackError, match=os.strerror(code).lower().replace("(", r"\(")):
            prune(str(built("llama")), out=tmp_path / "p", blocks="1", quiet=True)
    assert names(tmp_path) == []
    prune(str(built("llama")), out=tmp_path / "p", blocks="1", quiet=True)


@pytest.mark.fault(50)
def test_a_short_write_is_gone_on_with(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prune(str(built("llama")), out=tmp_path / "whole", blocks="1", quiet=True)
    real = os.pwrite
    short: list[int] = []

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        short.append(len(data) // 2)
        return real(descriptor, data[: max(1, len(data) // 2)], offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    prune(str(built("llama")), out=tmp_path / "p", blocks="1", verify=True, quiet=True)
    assert any(short)
    name = "model.safetensors"
    assert (tmp_path / "p" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.fault(54)
def test_data_is_on_disk_before_the_name_is(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Power loss: every file and folder is flushed before the rename, and the parent after it."""
    events: list[str] = []
    real_fsync, real_rename = os.fsync, Path.rename

    def fsync(descriptor: int) -> None:
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real_fsync(descriptor)

    def rename(self: Path, target: Path) -> Path:
        events.append(f"rename {self.name}")
        return real_rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    prune(str(built("llama")), out=tmp_path / "p", blocks="1", quiet=True)
    renamed = next(index for index, event in enumerate(events) if event.startswith("rename"))
    flushed = {Path(event).name for event in events[:renamed]}
    assert {path.name for path in (tmp_path / "p").iterdir()} <= flushed
    assert any(name.startswith(".p.shortstack-stage") for name in flushed)
    assert events[renamed + 1 :] == [str(tmp_path)]


@pytest.mark.fault(55)
@pytest.mark.parametrize("out", ["/proc/nowhere/p", "/sys/p"])
def test_places_that_cannot_be_written(built: Built, out: str) -> None:
    """Found by making the stage first, before any work."""
    with pytest.raises(ShortstackError) as caught:
        prune(str(built("llama")), out=Path(out), blocks="1", quiet=True)
    assert "/proc" in caught.value.message or "/sys" in caught.value.message
    assert caught.value.hint


@pytest.mark.fault(55)
def test_no_permission(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mkdir(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(ShortstackError, match="no permission to write there"):
        prune(str(built("llama")), out=tmp_path / "p", blocks="1", quiet=True)


@pytest.mark.fault(55)
def test_scores_that_could_not_be_written_are_not_computed(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("shortstack.scoring.score._scored", lambda *_, **__: pytest.fail("was computed"))
    with pytest.raises(ShortstackError, match="cannot be written there"):
        score(str(built("llama")), out=tmp_path / "file/s.json", samples=2, seq_len=16, quiet=True)


@pytest.mark.fault(93)
def test_a_table_that_cannot_be_written(built: Built, tmp_path: Path) -> None:
    """The scores are there already; the table's error is its own."""
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv/ppl_n2").write_text("a file where the folder should be")
    with pytest.raises(ShortstackError, match="csv.*could not be written"):
        score(str(built("llama")), out=tmp_path / "s.json", csv=tmp_path / "csv", samples=2, seq_len=16, quiet=True)
    assert json.loads((tmp_path / "s.json").read_text())["criteria"]


CSV_COMMANDS = ("score", "eval ppl", "eval zeroshot", "eval samples", "eval all", "bench")


@pytest.mark.fault(93)
@pytest.mark.parametrize("name", CSV_COMMANDS)
@pytest.mark.parametrize(
    ("folder", "says"),
    [("file", "cannot be written there"), ("file/deeper", "cannot be written there"), ("new.csv", "expected a folder")],
)
def test_a_folder_of_tables_that_cannot_be_written(
    name: str, folder: str, says: str, built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever writes tables says so before any work, and alike."""
    from shortstack.registry import COMMANDS

    monkeypatch.setattr("shortstack.scoring.score._scored", lambda *_, **__: pytest.fail("was computed"))
    monkeypatch.setattr("shortstack.engine.load.load_model", lambda *_, **__: pytest.fail("was loaded"))
    (tmp_path / "file").write_text("")
    assert {command for command, row in COMMANDS.items() if "csv" in row.options} == set(CSV_COMMANDS)
    with pytest.raises(ShortstackError, match=says) as error:
        COMMANDS[name].stage(str(built("llama")), csv=tmp_path / folder, quiet=True)
    assert len(error.value.message.splitlines()) == 1


@pytest.mark.fault(56)
@pytest.mark.parametrize("where", ["model", "model/p", "link", "link/p", "model/../model"])
def test_no_way_leads_into_the_input(copied: Built, tmp_path: Path, where: str) -> None:
    model = copied("llama")
    (tmp_path / "link").symlink_to(model)
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    with pytest.raises(ShortstackError, match="the input"):
        prune(str(model), out=tmp_path / where, blocks="1", force=True, quiet=True)
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


@pytest.mark.fault(57)
def test_a_link_into_the_hub_cache(built: Built, tmp_path: Path) -> None:
    snapshot = tmp_path / "cache/models--org--name/snapshots/abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "link").symlink_to(snapshot)
    with pytest.raises(ShortstackError, match="hub cache"):
        prune(str(built("llama")), out=tmp_path / "link/p", blocks="1", quiet=True)
    assert names(snapshot) == []


@pytest.mark.fault(58)
def test_who_holds_the_lock_is_said(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from shortstack.runtime.atomic_output import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "p")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    says = rf"another shortstack process .*process {other.pid} on .*, since 20"
    with pytest.raises(ShortstackError, match=says), published(tmp_path / "p"):
        pytest.fail("two writers at once")
    other.communicate("")
    with published(tmp_path / "p") as stage:
        (stage / "x").write_text("")
    assert names(tmp_path) == ["p"]


@pytest.mark.fault(58)
def test_the_lock_of_a_process_that_died_is_taken_over(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from shortstack.runtime.atomic_output import locked\n"
        "with locked(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "p")], check=False)
    assert names(tmp_path) == [".p.shortstack.lock"]
    with locked(tmp_path / "p"):
        pass
    assert names(tmp_path) == []


@pytest.mark.fault(58)
def test_two_scoring_runs_on_one_output(built: Built, tmp_path: Path) -> None:
    with locked(tmp_path / "s.json"), pytest.raises(ShortstackError, match="another shortstack process"):
        score(str(built("llama")), out=tmp_path / "s.json", samples=2, seq_len=16, quiet=True)


@pytest.mark.fault(59)
@pytest.mark.parametrize("how", ["replaced", "rewritten", "grown"])
def test_an_input_that_changes_while_it_is_read(
    copied: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    from shortstack.checkpoint import pieces

    model = copied("llama")
    path = model / "model.safetensors"
    real, done = pieces.read_exactly, [False]

    def read_exactly(*arguments: Any) -> None:
        real(*arguments)
        if not done[0] and arguments[3] == path:
            done[0] = True
            if how == "replaced":
                shutil.copyfile(path, tmp_path / "new")
                (tmp_path / "new").replace(path)
            elif how == "rewritten":
                os.utime(path, ns=(1, 1))
            else:
                with path.open("ab") as stream:
                    stream.write(b"more")

    monkeypatch.setattr(pieces, "read_exactly", read_exactly)
    with pytest.raises(ShortstackError, match="the file changed while it was read"):
        prune(str(model), out=tmp_path / "p", blocks="1", quiet=True)
    assert not (tmp_path / "p").exists()


@pytest.mark.fault(60)
def test_a_file_that_shrinks_while_it_is_copied(copied: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positioned reads, no mmap: an error and not the end of the process."""
    from shortstack.checkpoint import pieces

    model = copied("llama")
    path = model / "model.safetensors"
    real = pieces._fill

    def fill(*arguments: Any, **named: Any) -> None:
        os.truncate(path, 1000)
        real(*arguments, **named)

    monkeypatch.setattr(pieces, "_fill", fill)
    with pytest.raises(ShortstackError, match="ended at byte"):
        prune(str(model), out=tmp_path / "p", blocks="1", quiet=True)
    assert names(tmp_path) == ["model"]


@pytest.mark.fault(61)
@pytest.mark.parametrize("code", [errno.EXDEV, errno.ENOSYS])
def test_file_systems_that_cannot_rename(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def rename(self: Path, target: Path) -> Path:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "rename", rename)
    prune(str(built("llama")), out=tmp_path / "p", blocks="1", verify=True, quiet=True)
    assert open_checkpoint(tmp_path / "p").depth == 5
    assert names(tmp_path) == ["p"]


@pytest.mark.fault(61)
def test_a_fallback_that_fails_leaves_nothing(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(self: Path, target: Path) -> Path:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    real, count = shutil.copyfile, [0]

    def copyfile(source: Path, target: Path) -> Any:
        count[0] += 1
        if count[0] == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(source, target)

    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(writer.shutil, "copyfile", copyfile)
    with pytest.raises(ShortstackError, match="no space left"):
        prune(str(built("llama")), out=tmp_path / "p", blocks="1", quiet=True)
    assert names(tmp_path) == []


@pytest.mark.fault(62)
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_modes_follow_the_umask(built: Built, tmp_path: Path, umask: int) -> None:
    old = os.umask(umask)
    try:
        prune(str(built("llama")), out=tmp_path / "p", blocks="1", quiet=True)
    finally:
        os.umask(old)
    for path in (tmp_path / "p").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) in (0o644 & ~umask, 0o666 & ~umask)


@pytest.mark.fault(51)
def test_an_output_that_was_moved_away_comes_back(built: Built, tmp_path: Path) -> None:
    """Killed between the two renames of --force: the next run finds the old output where it was."""
    prune(str(built("llama")), out=tmp_path / "p", blocks="1", quiet=True)
    (tmp_path / "p").rename(tmp_path / ".p.shortstack-stage-999999999-old")
    with pytest.raises(ShortstackError, match="exists already"):
        prune(str(built("llama")), out=tmp_path / "p", blocks="2", quiet=True)
    assert open_checkpoint(tmp_path / "p").original_blocks == (0, 2, 3, 4, 5)
    assert names(tmp_path) == ["p"]
