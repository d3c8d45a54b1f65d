"""Errors that Python callers see name keywords; those of the command line name options."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shortstack
from shortstack.cli.app import run
from shortstack.common.keywords import in_python
from shortstack.registry import COMMANDS

Built = Callable[..., Path]
SCORE = COMMANDS["score"].options
PLAN = COMMANDS["plan"].options


@pytest.mark.parametrize(
    ("text", "given", "spoken"),
    [
        ("--seq-len 128: expected at most 64", {}, "seq_len=128: expected at most 64"),
        ("--data /a/b.txt: no such file", {}, "data='/a/b.txt': no such file"),
        ("--criterion 'ppl,ppl': duplicate", {}, "criterion='ppl,ppl': duplicate"),
        ("--criterion ppl contradicts it", {"criterion": "ppl"}, "criterion='ppl' contradicts it"),
        ("--criterion contradicts it", {}, "criterion contradicts it"),
        ("--until stable: for ppl alone", {}, "until='stable': for ppl alone"),
        ("--allow-links follows them", {}, "allow_links=True follows them"),
        ("such as --blocks 3,7-9", {}, "such as blocks='3,7-9'"),
        ("--criterion ppl", {}, "criterion='ppl'"),
        ("fewer --samples, or a smaller --seq-len", {}, "fewer samples, or a smaller seq_len"),
        ("shortstack score MODEL --out s.json writes one", {}, "shortstack score MODEL --out s.json writes one"),
        ("--verify is of another command", {}, "verify is of another command"),
        ("--no-merge of another command", {}, "merge=False of another command"),
        ("--rank 8 of another command", {}, "rank=8 of another command"),
        ("pip install --upgrade torch", {}, "pip install --upgrade torch"),
        ("llama-quantize --prune-layers 1 takes them", {}, "llama-quantize --prune-layers 1 takes them"),
        ("--memory-limit 1.5GB is not", {}, "memory_limit='1.5GB' is not"),
        ("give --out FILE", {}, "give out=FILE"),
    ],
)
def test_words(text: str, given: dict[str, Any], spoken: str) -> None:
    assert in_python(text, SCORE, given) == spoken


def test_a_switch_that_is_off() -> None:
    assert in_python("--no-plus, or remove fewer", PLAN, {}) == "plus=False, or remove fewer"


CALLS: list[tuple[str, dict[str, Any], str]] = [
    ("plan", {}, "blocks="),
    ("plan", {"scores": "/no/file.json", "remove": 1}, "/no/file.json"),
    ("plan", {"blocks": [1], "remove": 1}, "remove"),
    ("plan", {"blocks": "x"}, "blocks='x'"),
    ("score", {"remove": 2}, "remove"),
    ("score", {"until": "stable"}, "remove="),
    ("score", {"device": "cdua"}, "device='cdua'"),
    ("score", {"memory_limit": "a"}, "memory_limit='a'"),
    ("score", {"criterion": "taylor:q=2"}, "taylor:q=2"),
    ("evaluate", {"seq_len": 1}, "seq_len='1'"),
]


@pytest.mark.parametrize(("name", "given", "found"), CALLS, ids=[f"{name} {given}" for name, given, _ in CALLS])
def test_no_option_of_the_command_line_is_in_an_error_in_python(
    name: str, given: dict[str, Any], found: str, built: Built
) -> None:
    with pytest.raises(shortstack.ShortstackError) as caught:
        getattr(shortstack, name)(str(built("llama")), **given)
    assert found in str(caught.value)
    assert "--" not in str(caught.value).partition("shortstack score")[0]


def test_the_command_line_still_names_options(built: Built, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["plan", str(built("llama")), "--blocks", "x"]) == 2
    assert capsys.readouterr().err == "error: --blocks 'x': 'x' is not a block number\nhint: such as --blocks 3,7-9\n"
    assert run(["score", str(built("llama")), "--memory-limit", "a"]) == 2
    assert capsys.readouterr().err == "error: --memory-limit 'a' is not a size\nhint: such as 4GB, 500MB or 2000000\n"


def test_what_is_called_by_itself_speaks_python_too(built: Built, tmp_path: Path) -> None:
    """Records, and functions and methods of results that are no command."""
    scores = shortstack.score(str(built("llama")), criterion=["magnitude", "magnitude:block=mean"], quiet=True)
    with pytest.raises(shortstack.ShortstackError, match="choose one with criterion$"):
        scores.criterion()
    with pytest.raises(shortstack.ShortstackError, match="plus=False switches the protection off$"):
        shortstack.PrunePlan("model", "", (0, 1, 2), (0,), protected=(0,))
    (tmp_path / "model").mkdir()
    (tmp_path / "elsewhere.json").write_text((built("llama") / "config.json").read_text())
    for file in built("llama").iterdir():
        (tmp_path / "model" / file.name).symlink_to(tmp_path / "elsewhere.json" if "config" in file.name else file)
    with pytest.raises(shortstack.ShortstackError) as caught:
        shortstack.open_checkpoint(tmp_path / "model")
    assert "allow_links" in str(caught.value)
    assert "--" not in str(caught.value)
