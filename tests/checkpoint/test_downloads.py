"""Downloads from the hub: a bar with name, size and progress on a terminal, and nothing where nobody looks."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shortstack.checkpoint.downloads import counting_bar
from tests.hub_server import serving

Built = Callable[..., Path]


@pytest.fixture(scope="module")
def endpoint(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("hub")
    model = Path(shutil.copytree(built("llama"), folder / "model"))
    (model / "unneeded.h5").write_bytes(b"0" * 5_000_000)
    texts = folder / "texts"
    texts.mkdir()
    (texts / "train.txt").write_text("a text that is long enough for some windows. " * 60)
    with serving({"org/model": model, "datasets/org/texts": texts}) as (address, _):
        yield address


def run(endpoint: str, home: Path, *arguments: str, terminal: bool) -> str:
    """What a command wrote to stderr, which is a terminal or a pipe."""
    variables = {
        **os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    variables.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-m", "shortstack", *arguments]
    if not terminal:
        done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stderr
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, env=variables) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # the other end was closed
                break
            shown += piece
    os.close(ours)
    assert process.returncode == 0, shown
    return shown.decode()


def test_a_model_shows_name_size_and_progress_on_a_terminal(endpoint: str, built: Built, tmp_path: Path) -> None:
    shown = run(endpoint, tmp_path, "plan", "org/model", "--blocks", "1", terminal=True)
    size = sum(path.stat().st_size for path in built("llama").iterdir() if path.name != "config.json")
    assert "downloading org/model: " in shown
    assert f"/{size / 1000:.0f}k" in shown  # of what is needed alone
    assert "Fetching" not in shown
    assert "Reconstructing" not in shown
    assert "downloading" not in run(endpoint, tmp_path, "plan", "org/model", "--blocks", "1", terminal=True)


def test_a_data_set_too(endpoint: str, tmp_path: Path) -> None:
    arguments = ("score", "embedded", "--data", "org/texts", "--criterion", "ppl", "--samples", "2", "--seq-len", "16")
    shown = run(endpoint, tmp_path, *arguments, terminal=True)
    assert "downloading org/texts train.txt: " in shown
    assert "/2.70k" in shown


@pytest.mark.parametrize(("terminal", "more"), [(False, ()), (True, ("--quiet",))], ids=["pipe", "quiet"])
def test_silence_where_nobody_looks(endpoint: str, tmp_path: Path, terminal: bool, more: tuple[str, ...]) -> None:
    arguments = ("prune", "org/model", "--blocks", "1", "--out", str(tmp_path / "out"), *more)
    assert run(endpoint, tmp_path / "home", *arguments, terminal=terminal) == ""


def test_what_the_furthest_bar_counts_is_passed_on() -> None:
    """The library has one bar of what comes over the network, one of what reaches the disk, and one of files."""
    seen: list[int] = []
    bar = counting_bar(seen.append)
    network, disk, files = bar(unit="B", total=100, initial=10), bar(unit="B", total=0), bar(range(2), unit="it")
    network.update(30)
    disk.update(20)
    disk.update(30)
    assert list(files) == [0, 1]
    files.update(50)
    assert sum(seen) == 50
    assert min(seen) > 0
