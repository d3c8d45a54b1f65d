"""Documents -> token ids, and which of them count: all of a text, the response of an instruction or a chat.

A token and whether it counts travel as one whole number through whatever draws and cuts windows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from shortstack.data.answers import IGNORED
from shortstack.data.chats import Chat
from shortstack.data.instructions import labelled_row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Encoder(Protocol):
    """Makes numbers of documents, and looks at windows that are cut of them."""

    def __call__(self, document: Any) -> list[int]:
        """A document's numbers."""

    def joined(self, documents: Sequence[Any]) -> list[int]:
        """Those of documents behind one another."""

    @property
    def too_little(self) -> str:
        """What to do where there is too little of it."""

    def counts(self, window: Sequence[int], /) -> bool:
        """Whether a token of a window is predicted and counts."""


@dataclass(frozen=True)
class TextEncoder:
    """The tokenizer with its options set, without its warning about long texts."""

    tokenizer: PreTrainedTokenizerBase
    special_tokens: bool
    too_little: ClassVar[str] = "give more text"

    def __call__(self, document: str) -> list[int]:
        """Token ids."""
        encoded = self.tokenizer(document, add_special_tokens=self.special_tokens, verbose=False)
        return list(encoded["input_ids"])

    def joined(self, documents: Sequence[str]) -> list[int]:
        """Of all texts as one, with a blank line between them."""
        return self("\n\n".join(documents))

    def counts(self, _: Sequence[int], /) -> bool:
        """All tokens do."""
        return True


@dataclass(frozen=True)
class ResponseEncoder:
    """Rows of instructions and chats as retraining reads them, and what a model wrote.

    The last bit of a number says whether the token counts.
    """

    tokenizer: PreTrainedTokenizerBase
    bos_every: bool = False
    too_little: ClassVar[str] = "give more rows with answers (--count-prompts counts prompts, too)"

    def __call__(self, document: Chat | tuple[str, Mapping[str, Any]] | tuple[list[int], list[bool]]) -> list[int]:
        """A chat; (place, row) of an instruction; or (token ids, which of them count)."""
        if not isinstance(document, Chat) and isinstance(document[0], list):
            return [2 * token + counts for token, counts in zip(*document, strict=True)]
        place, row = (document.place, document) if isinstance(document, Chat) else document
        ids, labels = labelled_row(str(place), row, self.tokenizer)
        return [2 * token + (label != IGNORED) for token, label in zip(ids, labels, strict=True)]

    def joined(self, documents: Sequence[Any]) -> list[int]:
        """Of rows as they follow one another."""
        return [number for document in documents for number in self(document)]

    def counts(self, window: Sequence[int], /) -> bool:
        """The first token of a window is never predicted; BOS before every window takes the place of the last one."""
        return any(number & 1 for number in (window[1:-1] if self.bos_every else window[1:]))


def separated(encoder: Encoder, windows: list[list[int]]) -> tuple[list[list[int]], list[list[bool]] | None]:
    """(token ids, which of them count: None for all) of windows of what an encoder made."""
    if not isinstance(encoder, ResponseEncoder):
        return windows, None
    ids = [[number >> 1 for number in window] for window in windows]
    return ids, [[False, *(bool(number & 1) for number in window[1:])] for window in windows]
