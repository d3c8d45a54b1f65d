"""Measures of continuations and the probes, from their definitions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shortstack.evaluation.prompts import Probe, make_probes
from shortstack.evaluation.text_metrics import (
    distinct_n,
    ends_in_loop,
    longest_repeat,
    outside_scripts,
    pieces_of,
    scripts_of,
)
from tests import pico

TOKENS = st.lists(st.integers(0, 3), max_size=24)


def test_distinct_n() -> None:
    assert distinct_n([1, 2, 3], 1) == 1.0
    assert distinct_n([1, 1, 1, 1], 1) == 0.25
    assert distinct_n([1, 2, 1, 2], 2) == pytest.approx(2 / 3)  # 12 21 12
    assert distinct_n([1], 2) == 1.0
    assert distinct_n([], 1) == 1.0


@given(TOKENS)
def test_longest_repeat_is_what_trying_every_span_finds(tokens: list[int]) -> None:
    spans = [
        length
        for length in range(1, len(tokens))
        for start in range(len(tokens) - length + 1)
        if any(tokens[other : other + length] == tokens[start : start + length] for other in range(start))
    ]
    assert longest_repeat(tokens) == max(spans, default=0)


@given(TOKENS, st.integers(1, 5), st.integers(3, 5))
def test_a_loop_is_seen(start: list[int], period: int, turns: int) -> None:
    assert ends_in_loop([*start, *list(range(10, 10 + period)) * turns])
    assert not ends_in_loop([*range(20, 20 + len(start)), *list(range(10, 10 + period)) * 2])


def test_scripts() -> None:
    assert scripts_of("Hello, 42!") == {"LATIN"}
    assert scripts_of("мир and 世界") == {"CYRILLIC", "LATIN", "CJK"}
    assert scripts_of("123 ...") == set()


def test_pieces_are_whole_characters() -> None:
    tokenizer = pico.tokenizer()  # a token per byte

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids))

    ids = tokenizer("aж世b", add_special_tokens=False)["input_ids"]
    assert pieces_of(ids, decode) == [("a", 1), ("ж", 2), ("世", 3), ("b", 1)]
    broken = ids[:4]  # the last character lacks two bytes
    assert pieces_of(broken, decode)[:2] == [("a", 1), ("ж", 2)]
    assert outside_scripts(pieces_of(broken, decode), {"LATIN", "CYRILLIC", "CJK"}) == pytest.approx(1 / 4)


def test_share_of_tokens_outside_the_script() -> None:
    pieces = [("ab", 1), (" 12", 2), ("ж", 1), ("cж", 1)]
    assert outside_scripts(pieces, {"LATIN"}) == pytest.approx(1 / 5)
    assert outside_scripts([], {"LATIN"}) == 0.0


def test_probes_are_right_and_the_same_for_a_seed() -> None:
    probes = make_probes(50, 1234)
    assert probes == make_probes(50, 1234)
    assert probes != make_probes(50, 1)
    for probe in probes:
        *shown, question = probe.prompt.split("\n")
        assert len(shown) == 3
        if probe.kind == "copying":
            assert question == f"{probe.answer} ->"
        else:
            assert eval(question.removesuffix("=")) == int(probe.answer)
            assert all(eval(line.split("=")[0]) == int(line.split("=")[1]) for line in shown)


def test_what_counts_as_right() -> None:
    total = Probe("arithmetic", "1 + 1 =", "2")
    assert total.is_right(" 2\n3 + 3 = 6")
    assert total.is_right("2.")
    assert not total.is_right(" 21")
    assert not total.is_right("")
    copied = Probe("copying", "a b ->", "a b")
    assert copied.is_right(" a b\nc d -> c d")
    assert not copied.is_right(" a b c")
