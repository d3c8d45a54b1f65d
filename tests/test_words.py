"""Plain English: words that the project does not use, in what a user reads and in the comments of the source."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "docs/guide/*.md", "docs/notebooks/*.md", "src/**/*.py", "src/**/*.yaml")
    for path in ROOT.glob(pattern)
)
DIARY = {"CHANGELOG.md", "experiments.md"}  # a diary keeps the words of its day

# what is not written -> what is written instead
AVOIDED = {
    r"\b(?:goes|gone|went|going) on\b|\bgo on\b": "resumes, continues",
    r"\bpassed (?:by|over)\b": "skipped, bypassed",
    r"\bbeg(?:in|ins|an|un) anew\b|\b(?:measures?|made|written|read|fits|fitted|compute[sd]?) anew\b": "again",
    r"\bmade small\b": "the loss",
    r"\bwell again\b|\b[Hh]ealth of\b|\bgeneration health\b": "recover quality, generation quality",
    r"\bheld out\b": "validation; held-out, of evaluation text",
    r"\b[Ll]anes?\b|\b[Ll]essons?\b": "data stream, cached teacher logits",
    r"\bis there twice\b": "duplicate",
    r"\bnothing (?:was|is) published\b(?! (?:of|under))": "no output was written",
    r"\basked for\b": "requested",
    r"\bmay go\b": "removable",
    r"\bon this disk\b": "local",
    r"\bit said\b|\bsaid nothing\b": "its last message, printed nothing",
    r"\bsomething else than\b": "something other than",
    r"\bas (?:it|they) stands?\b": "unchanged",
    r"\bc(?:a|o)me(?:s)? to be\b|\bc(?:a|o)mes? about\b": "was made",
    r"\bshould hear\b": "should know",
    r"\bset against\b|\bheld against\b": "compared with, checked against",
    r"\bbe had\b": "read, loaded, computed",
    r"\bwas made of\b|\bwere made of\b": "made from",
    r"\bnothing is known\b|\bof its own (?:environment|process)\b": "unknown; separate",
}


@pytest.mark.parametrize("avoided", AVOIDED)
def test_a_word_that_is_not_used(avoided: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}, line {number}: {line.strip()}"
        for path in PAGES
        if path.name not in DIARY
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(avoided, line)
    ]
    assert found == [], f"write instead: {AVOIDED[avoided]}"
