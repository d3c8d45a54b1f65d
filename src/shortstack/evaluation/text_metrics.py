"""Measures of a continuation: does it repeat itself, does it leave the prompt's script. Pure functions."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence

_LONGEST_PERIOD = 24  # tokens of what a loop repeats
_TURNS = 3  # of a loop


def distinct_n(tokens: Sequence[int], n: int) -> float:
    """Share of different n-grams among all n-grams (Li et al. 2016): 1 where nothing repeats; 1 for shorter texts."""
    grams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def longest_repeat(tokens: Sequence[int]) -> int:
    """Length in tokens of the longest span that occurs a second time; the two may overlap."""
    best = 0
    before = [0] * (len(tokens) + 1)
    for end in range(len(tokens)):  # before[k]: how long the span is that ends at k - 1 and at end - 1 alike
        now = [0] * (len(tokens) + 1)
        for earlier in range(end):
            if tokens[earlier] == tokens[end]:
                now[earlier + 1] = before[earlier] + 1
                best = max(best, now[earlier + 1])
        before = now
    return best


def ends_in_loop(tokens: Sequence[int]) -> bool:
    """Whether the text ends with the same few tokens three times in a row or more."""
    for period in range(1, min(_LONGEST_PERIOD, len(tokens) // _TURNS) + 1):
        tail = tokens[-period:]
        if all(tokens[-(turn + 1) * period : -turn * period] == tail for turn in range(1, _TURNS)):
            return True
    return False


def scripts_of(text: str) -> set[str]:
    """The scripts of a text's letters, such as LATIN and CYRILLIC, by their names in Unicode."""
    return {unicodedata.name(letter, "UNKNOWN").split()[0] for letter in text if letter.isalpha()}


def pieces_of(tokens: Sequence[int], decode: Callable[[list[int]], str]) -> list[tuple[str, int]]:
    """The text in pieces that are whole characters: (text, how many tokens it takes)."""
    pieces: list[tuple[str, int]] = []
    pending: list[int] = []
    for token in tokens:
        pending.append(token)
        text = decode(pending)
        if not text.endswith("\ufffd") or len(pending) > 4:  # no character takes more than four bytes
            pieces.append((text, len(pending)))
            pending = []
    return [*pieces, (decode(pending), len(pending))] if pending else pieces


def outside_scripts(pieces: Sequence[tuple[str, int]], allowed: set[str]) -> float:
    """Share of tokens with letters of which none is of an allowed script; broken characters count as outside."""
    total = sum(tokens for _, tokens in pieces)
    outside = sum(
        tokens for text, tokens in pieces if "\ufffd" in text or (scripts_of(text) and not scripts_of(text) & allowed)
    )
    return outside / total if total else 0.0
