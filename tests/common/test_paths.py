"""What others read names no place on somebody's disk, and keeps every name that is no place."""

from __future__ import annotations

import pytest

from shortstack.common.paths import is_path, public_name, without_paths

PATHS = {
    "/home/ann/models/vicuna": "vicuna",
    "/home/ann/models/vicuna/": "vicuna",
    "/home/Ann Smith/my model": "my model",
    "~/models/vicuna": "vicuna",
    "~ann/models/vicuna": "vicuna",
    "./vicuna": "vicuna",
    "../runs/vicuna": "vicuna",
    "runs/today/vicuna": "vicuna",
    "data/text.jsonl": "text.jsonl",
    "C:\\Users\\ann\\vicuna": "vicuna",
    "runs\\vicuna": "vicuna",
    "file:///home/ann/vicuna": "vicuna",
    "/": "...",
}
NAMES = ["embedded", "org/name", "org/name@v2", "wikitext2", "text.txt", "https://host/a/b", "published:taylor", ""]


@pytest.mark.parametrize("path", PATHS)
def test_of_a_path_the_last_part_is_left(path: str) -> None:
    assert is_path(path)
    assert public_name(path) == PATHS[path]
    assert without_paths(path) == PATHS[path]


@pytest.mark.parametrize("name", NAMES)
def test_names_ids_and_addresses_stay(name: str) -> None:
    assert not is_path(name)
    assert public_name(name) == without_paths(name) == name


def test_lists_of_sources() -> None:
    assert public_name("wikitext2,/data/mine.txt") == "wikitext2, mine.txt"


def test_records_are_gone_through_to_the_bottom() -> None:
    record = {
        "source": "/home/ann/m",
        "steps": [{"data": {"/data/a.txt": 1, "rows": 3, "none": None, "on": True}}],
        "note": "read /home/ann/text.txt, then ~/b/c (see https://host/a/b and 3/4 of ./d/e.json)",
        "place": "lora of /home/ann/m: best",
        "ppl:/home/ann/t.txt": "see file:///home/ann/t.txt",
        "unit": "tokens/s",
    }
    assert without_paths(record) == {
        "source": "m",
        "steps": [{"data": {"a.txt": 1, "rows": 3, "none": None, "on": True}}],
        "note": "read text.txt, then c (see https://host/a/b and 3/4 of e.json)",
        "place": "lora of m: best",
        "ppl:t.txt": "see t.txt",
        "unit": "tokens/s",
    }


def test_what_names_a_source_stays() -> None:
    named = "general=/home/ann/books.txt,own=self:sub/folder/prompts.jsonl,c4=c4"
    assert public_name(named) == "general=books.txt, own=self:prompts.jsonl, c4=c4"
    assert without_paths({"source": named}) == {"source": "general=books.txt,own=self:prompts.jsonl,c4=c4"}
