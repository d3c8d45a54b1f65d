"""What may stand before the place of a text: its name, as in `general=books.txt`, and `self:`, as in `self:prompts.txt`."""

from __future__ import annotations

import re

SELF = "self:"
NAMED = re.compile(r"\s*([A-Za-z0-9][\w.-]*)=(.*)", re.DOTALL)


def before_and_place(part: str) -> tuple[str, str]:
    """(`general=`, `self:`, both or nothing; the file, folder or set behind it), by the text alone."""
    match = NAMED.fullmatch(part)
    before, place = (f"{match[1]}=", match[2].strip()) if match else ("", part)
    return (before + SELF, place.removeprefix(SELF)) if place.startswith(SELF) else (before, place)
