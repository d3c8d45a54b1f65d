"""What a run that may be killed keeps: its folder, records with the key of what made them, and the cache of findings."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shortstack.errors import ShortstackError
from shortstack.runtime.workspace import (
    append_log,
    cache,
    cache_folder,
    cached,
    differences,
    forget,
    load_log,
    load_state,
    read_log,
    save_state,
    workspace,
)

KEY: dict[str, Any] = {"model": "abc", "windows": (1, 2), "settings": {"dtype": "float32", "rate": math.inf}}


def test_the_folder_stays_where_the_run_fails_and_goes_when_it_ends_well(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    with pytest.raises(ShortstackError), workspace(out) as work:  # noqa: PT012
        save_state(work / "state.json", KEY, done=3)
        raise ShortstackError("out of memory")
    assert [path.name for path in tmp_path.iterdir()] == [".out.json.shortstack-work"]
    with workspace(out) as work:
        assert load_state(work / "state.json", KEY) == ({"done": 3}, [])
    assert list(tmp_path.iterdir()) == []


def test_one_process_alone_makes_an_output(tmp_path: Path) -> None:
    with workspace(tmp_path / "out"):
        with (
            pytest.raises(ShortstackError, match="another shortstack process is writing it"),
            workspace(tmp_path / "out"),
        ):
            pass
        with workspace(tmp_path / "out", leads=False) as work:  # one of those that share the work
            work.mkdir()
        assert work.is_dir(), "the process that leads removes it"
    assert not work.exists()


def test_nothing_is_kept_where_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with workspace(None) as work:
        assert work is None
    assert list(tmp_path.iterdir()) == []


def test_keys_are_compared_field_by_field() -> None:
    as_read = {"model": "abc", "windows": [1, 2], "settings": {"dtype": "float32", "rate": math.inf}}
    assert differences(as_read, KEY) == []
    assert differences(KEY, {**KEY, "settings": {"dtype": "bfloat16", "rate": math.nan}, "seed": 7}) == [
        "seed was not there, now 7",
        "settings.dtype was float32, now bfloat16",
        "settings.rate was inf, now nan",
    ]
    assert differences({"rate": math.nan}, {"rate": math.nan}) == []
    assert differences("no record", {"a": 1}) == ["a was not there, now 1"]


def test_a_state_of_another_key_names_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "deep/state.json"
    save_state(path, KEY, found=[1.5, math.inf])
    assert load_state(path, KEY) == ({"found": [1.5, math.inf]}, [])
    assert load_state(path, {**KEY, "model": "xyz"}) == ({"found": [1.5, math.inf]}, ["model was abc, now xyz"])


@pytest.mark.fault(53)
@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda _: b"", lambda _: b"[1]", lambda _: b"\xff"]
)
def test_a_state_that_cannot_be_read_is_as_good_as_none(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "state.json"
    assert load_state(path, KEY) == ({}, [])
    save_state(path, KEY, done=1)
    path.write_bytes(damage(path.read_bytes()))
    assert load_state(path, KEY) == ({}, [])


@pytest.mark.fault(53)
def test_a_log_that_was_cut_off_within_a_line_goes_on_after_the_last_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "sets.jsonl"
    assert load_log(path, KEY) == ([], [])
    append_log(path, [{"n": number} for number in range(5)])
    whole = path.read_bytes()
    for end in range(len(whole) - 9, len(whole)):
        path.write_bytes(whole[:end])
        assert load_log(path, KEY) == ([{"n": number} for number in range(4)], [])
        append_log(path, [{"n": 4}])
        assert path.read_bytes() == whole
    assert len(read_log(path)) == 6
    assert load_log(path, {**KEY, "model": "xyz"}) == ([], ["model was abc, now xyz"])
    assert len(read_log(path)) == 1, "the log is of the new key"
    path.write_text('{"n": 1}\n{"n": 2}\n')
    assert load_log(path, KEY) == ([], []), "no key: whose it is nobody knows"


def test_what_was_found_is_kept_by_all_that_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHORTSTACK_CACHE", str(tmp_path / "cache"))
    other = {**KEY, "model": "xyz"}
    assert cached(KEY) is None
    cache(KEY, {"nll": math.inf, "number": 1})
    assert cached(dict(reversed(KEY.items()))) == {"nll": math.inf, "number": 1}, "by what it holds"
    assert cached(other) is None
    cache(other, {"number": 2})
    cache(KEY, {"number": 3})
    assert (cached(KEY), cached(other)) == ({"number": 3}, {"number": 2})
    first, second = sorted((cache_folder() / "results").iterdir(), key=lambda path: "xyz" in path.read_text())
    record = json.loads(first.read_text())
    first.write_text(json.dumps({**record, "key": json.loads(second.read_text())["key"]}))
    assert cached(KEY) is None, "a file under this name, of another key"
    forget(other)
    forget({"never": "kept"})
    assert [path.name for path in (cache_folder() / "results").iterdir()] == [first.name]
    (tmp_path / "cache/results").rename(tmp_path / "cache/results-moved")
    (tmp_path / "cache/results").write_text("no folder")
    cache(KEY, {"number": 4})  # a cache that cannot be written costs time alone
    assert cached(KEY) is None
