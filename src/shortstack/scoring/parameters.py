"""What a parameter in a criterion's name may be, such as the 2 of `taylor:p=2`."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class WholeNumber:
    """A parameter that is a whole number from 1 to `at_most`."""

    default: int | None
    at_most: int = 10**6

    def read(self, text: str) -> int:
        """Its value.

        Raises:
            ValueError: with what was expected.
        """
        if not re.fullmatch(r"\d{1,9}", text) or not 1 <= int(text) <= self.at_most:
            raise ValueError(f"a whole number from 1 to {self.at_most}")
        return int(text)


@dataclass(frozen=True)
class OneOf:
    """A parameter that is one of some words."""

    default: str
    words: tuple[str, ...]

    def read(self, text: str) -> str:
        """Its value.

        Raises:
            ValueError: with what was expected.
        """
        if text not in self.words:
            raise ValueError(f"one of {', '.join(self.words)}")
        return text
