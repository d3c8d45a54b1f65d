"""Outputs that are inputs: refused by every command, before anything runs, and the input is as it was."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shortstack.common.own_inputs import refuse_own_inputs
from shortstack.errors import ShortstackError
from shortstack.registry import COMMANDS

_WRITE = sorted(name for name, command in COMMANDS.items() if "out" in command.options)


def _checkpoint(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.fault(133)
@pytest.mark.parametrize("name", _WRITE)
def test_no_command_writes_over_what_it_reads(name: str, tmp_path: Path) -> None:
    """By the first option that takes what is on the disk: a file, or a folder that holds a model."""
    function = COMMANDS[name].stage
    first = next(iter(COMMANDS[name].options.values()))
    if first.name == "out":
        pytest.skip("it reads nothing")
    read = _checkpoint(tmp_path / "read")
    target = read / "config.json"
    for given in (str(read), str(target)):
        call = ((given,), {}) if first.positional else ((), {first.name: given})
        with pytest.raises(ShortstackError, match="which is never touched"):
            function(*call[0], **call[1], out=target)
        assert target.read_text() == "{}"


@dataclass(frozen=True)
class _Text:
    data: str


@pytest.mark.fault(133)
@pytest.mark.parametrize("link", ["", "symbolic"])
@pytest.mark.parametrize(
    "values",
    [
        {"data": "a.txt"},
        {"data": "wikitext2,a.txt"},
        {"scores": Path("a.txt")},
        {"sources": [Path("b.txt"), Path("a.txt")]},
        {"text": _Text("./a.txt")},
    ],
    ids=["text", "part", "path", "many", "record"],
)
def test_wherever_the_input_is_named(
    values: dict[str, Any], link: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("text")
    if link:
        os.symlink("a.txt", "link.txt")
    with pytest.raises(ShortstackError, match="is the input"):
        refuse_own_inputs({**values, "out": Path("link.txt" if link else "a.txt")})


def test_what_is_no_input_may_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is no checkpoint may get the output, as a run's folder does; names that are no paths are none."""
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("text")
    Path("run").mkdir()
    for out in ("run/report.html", "b.txt"):
        refuse_own_inputs({"sources": [Path("run"), Path("a.txt")], "text": "x\0y", "samples": 3, "out": Path(out)})
    refuse_own_inputs({"data": "a.txt", "out": None})


def test_other_outputs_are_named(tmp_path: Path) -> None:
    read = _checkpoint(tmp_path / "read")
    with pytest.raises(ShortstackError) as raised:
        refuse_own_inputs({"models": [str(read)], "csv": read / "tables"})
    assert "--csv" in (raised.value.hint or "")


@pytest.mark.fault(133)
@pytest.mark.parametrize("before", ["general=", "self:", "own=self:"])
def test_a_source_with_a_name_is_an_input(before: str, tmp_path: Path) -> None:
    (tmp_path / "books.txt").write_text("words")
    with pytest.raises(ShortstackError, match="which is never touched"):
        refuse_own_inputs({"data": f"c4=c4,{before}{tmp_path / 'books.txt'}", "out": tmp_path / "books.txt"})
