"""Which figures of one name have one unit: perplexities are per token, and another tokenizer's tokens are other units."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shortstack.artifacts.results import Result

_SETTINGS = {"tokenizer": "tokenizer", "bos_token": "BOS rule"}
_OF_TOKENS = ("tokens", "share")  # units of the measures of generated text that count tokens


def tokens_hash(texts: Iterable[Sequence[int]]) -> str:
    """A hash of the token ids that texts became: equal where tokenizers split them into the same tokens."""
    digest = hashlib.sha256()
    for ids in texts:
        digest.update(",".join(map(str, ids)).encode() + b"\n")
    return digest.hexdigest()


def is_per_token(result: Result, name: str) -> bool:
    """Whether a figure counts tokens of the model's own tokenizer, or is a mean over them."""
    figure = result.figures.get(name)
    if result.what == "generation":
        return figure is not None and figure.unit in _OF_TOKENS
    return result.what == "ppl"


def unit_differences(one: Result, other: Result) -> list[str]:
    """What makes per-token figures of two results different units, such as `tokenizer`; empty if they are the same.

    Results of earlier versions do not record their tokenizer: those of another number of tokens have another one.
    """
    known = [key for key in _SETTINGS if key in one.settings and key in other.settings]
    found = [_SETTINGS[key] for key in known if one.settings[key] != other.settings[key]]
    if one.what == "ppl" and "tokenizer" not in known:
        pairs = [(one.figures[name], other.figures[name]) for name in one.figures if name in other.figures]
        if any(a.n != b.n for a, b in pairs if a.value is not None and b.value is not None):
            found.append("number of tokens in the text")
    return found


def units_unknown(results: Iterable[Result]) -> list[str]:
    """Names of the models whose results do not record their tokenizer."""
    return [r.model for r in results if r.what in ("ppl", "generation") and "tokenizer" not in r.settings]


def unlike_notes(base: Result, others: Sequence[Result]) -> list[str]:
    """A line for each result whose per-token figures cannot be compared with the base's."""
    return [
        f"{base.what} of {other.model} and of {base.model}: they differ in the {' and the '.join(differing)}, so figures per "
        "token cannot be compared"
        for other in others
        if (differing := unit_differences(base, other))
    ]
