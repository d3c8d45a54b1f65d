"""YAML of anyone's making: what is read is what stands there, and nothing else happens (faults 71 to 73)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shortstack.errors import ShortstackError
from shortstack.recipes.resolve import resolve
from shortstack.recipes.safe_yaml import LARGEST, load_yaml, parse_yaml


def data(text: str) -> Any:
    return parse_yaml(text, "r.yaml").data


@pytest.mark.fault(73)
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E5", 1e5), (".5", 0.5), ("3", 3), ("-7", -7), ("010", 10), ("true", True), ("False", False),
        ("no", "no"), ("on", "on"), ("yes", "yes"), ("y", "y"), ("null", None), ("~", None), ("", None), ("1:30", "1:30"),
        ("2026-11-24", "2026-11-24"), ("1_000", "1_000"), ("0x1f", "0x1f"), ("'1e-4'", "1e-4"), ("37B", "37B"),
        ("$prune", "$prune"), ("taylor:p=2,batch=1", "taylor:p=2,batch=1"), ("[a, 1]", ["a", 1]),
        ("{a: {b: 1}}", {"a": {"b": 1}}),
    ],
)  # fmt: skip
def test_scalars_are_what_they_look_like(text: str, value: Any) -> None:
    found = data(f"key: {text}")["key"]
    assert found == value
    assert type(found) is type(value)


def test_every_key_has_its_line() -> None:
    loaded = parse_yaml("a: 1\nb:\n  c: 2\n  d: [x,\n    y]\n", "r.yaml")
    assert loaded.lines == {("a",): 1, ("b",): 2, ("b", "c"): 3, ("b", "d"): 4, ("b", "d", 0): 4, ("b", "d", 1): 5}


@pytest.mark.fault(73)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "r.yaml, line 3: duplicate key a (first in line 1)"),
        ("a: {b: 1, b: 2}", "r.yaml, line 1: duplicate key b"),
        ("1: x", "line 1: a key must be text, found !!int 1"),
        ("? [a]\n: x", "line 1: a key must be text"),
        ("a: b: c", "r.yaml, line 1: not valid YAML: mapping values are not allowed here"),
        ("a: [1, 2", "not valid YAML"),
        ("a: 1\n--- \nb: 2", "not valid YAML"),
        ("a: !!int x", "!!int x is not allowed in a recipe"),
        (f"a: {'1' * 5000}", "is not allowed in a recipe"),
        ("a: \x07", "not valid YAML"),
        ("[" * 3000, "not valid YAML"),
    ],
)
def test_refused_with_its_line(text: str, message: str) -> None:
    with pytest.raises(ShortstackError) as caught:
        data(text)
    assert message in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.fault(72)
@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.system ['touch MARK']",
        "!!python/object/new:os.system ['touch MARK']",
        "a: !!python/name:os.system",
        "a: !mine 1",
        "a: !!binary aGVsbG8=",
        "a: !!set {x: null}",
        "a: !!timestamp 2026-11-24",
    ],
)
def test_no_tag_is_followed(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ShortstackError, match="is not allowed in a recipe"):
        data(text)
    assert not list(tmp_path.iterdir())


@pytest.mark.fault(71)
def test_aliases_do_not_grow() -> None:
    bomb = 'a0: &a0 ["x", "x", "x", "x", "x", "x", "x", "x", "x"]\n' + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 40)
    )
    started = time.perf_counter()
    with pytest.raises(ShortstackError, match="once its aliases"):
        data(bomb)
    assert time.perf_counter() - started < 2
    assert data("a: &x [1, 2]\nb: *x") == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.fault(71)
def test_an_alias_inside_itself() -> None:
    with pytest.raises(ShortstackError, match="inside its own anchor"):
        data("a: &x [1, *x]")


@pytest.mark.fault(71)
def test_files_that_are_too_large_or_no_text(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"#" * (LARGEST + 1))
    with pytest.raises(ShortstackError, match="larger than 1 MB"):
        load_yaml(path)
    path.write_bytes(b"a: \xff\xfe")
    with pytest.raises(ShortstackError, match="not UTF-8 at byte 3"):
        load_yaml(path)
    with pytest.raises(ShortstackError, match="cannot be read"):
        load_yaml(tmp_path / "nowhere.yaml")
    with pytest.raises(ShortstackError, match="is a directory"):
        load_yaml(tmp_path)


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        parse_yaml(text, "r.yaml")
    except ShortstackError as error:
        assert "\n" not in error.message


def test_a_tab_and_a_list_of_steps_have_hints_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    for text, hint in (
        ("model: embedded\nsteps:\n\tscore: {}\n", "YAML is indented by spaces: replace the tab"),
        ("model: embedded\nsteps:\n  - score: {}\n", "write `name:` instead of `- name:`"),
    ):
        path.write_text(text)
        with pytest.raises(ShortstackError) as caught:
            resolve(str(path))
        assert caught.value.hint.startswith(hint)
