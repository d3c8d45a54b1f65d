"""Rows -> examples: instructions and chats with the loss on the response alone, unchanged windows of token ids.

What the rows hold decides what a source is: instruction, input and output under one of their names, prompt and
completion, or chats are examples, one a row; rows of text and text files are packed into windows (`packing.py`).
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from shortstack.common.json_text import json_text
from shortstack.common.progress import Progress
from shortstack.data.answers import IGNORED, labelled, labelled_chat
from shortstack.data.chats import CHAT_FIELDS, Chat, chat_of, is_chat, rendered
from shortstack.data.files import TEXT_SUFFIXES, source_files, suffix_of
from shortstack.data.row_prompt import AS_PUBLISHED, PromptRule
from shortstack.data.sources import file_rows, row_text
from shortstack.data.tokenizer import check_ids, end_of_text, open_ids
from shortstack.errors import ShortstackError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from shortstack.data.example_rows import ExampleRows

__all__ = ["IGNORED", "ExampleSet", "kind_of", "read_instructions", "split_off"]

RowKind = Literal["instructions", "text"]

# The names that sets give to what is asked, what is given with it, and what is answered; Alpaca's first.
_ASKED = ("instruction", "question", "query", "prompt")
_GIVEN = ("input", "context")
_ANSWERED = ("output", "response", "answer", "completion")
_ALPACA = (_ASKED[0], _GIVEN[0], _ANSWERED[0])
_JOINED = ("prompt", "completion")  # joined unchanged


@dataclass(frozen=True)
class ExampleSet:
    """Examples and what is known of them.

    Attributes:
        examples: in the order of the rows.
        source: what the user called them.
        sha256: of the rows as they were read.
        truncated: how many were longer than the cutoff.
        empty: how many were skipped, because nothing of their response lies within the cutoff.
        unanswered: how many were skipped, because their answer is empty or they have none.
        form: how the first row was read, where that is not plain.
    """

    examples: ExampleRows = field(repr=False)
    source: str
    sha256: str
    truncated: int = 0
    empty: int = 0
    unanswered: int = 0
    form: str = ""

    @property
    def rows(self) -> int:
        """Rows that were read, with those that were skipped."""
        return len(self.examples) + self.empty + self.unanswered

    @property
    def tokens(self) -> int:
        """Tokens of all examples."""
        return sum(self.examples.lengths)

    @property
    def predicted(self) -> int:
        """Tokens that the loss counts."""
        return self.examples.predicted

    def described(self) -> dict[str, Any]:
        """What a record says about the data."""
        return {"source": self.source, "sha256": self.sha256, "rows": self.rows}

    def to_text(self) -> str:
        """What to know before training on them."""
        masked = 1 - self.predicted / max(1, self.tokens)
        lines = [
            f"{self.source}: {self.rows} rows, {self.tokens} tokens; {self.truncated / self.rows:.1%} of the rows "
            f"truncated, {masked:.1%} of the tokens masked (prompts)"
        ]
        if self.form:
            lines.append(f"{self.source}: {self.form}")
        if self.empty:
            lines.append(f"{self.source}: {self.empty} rows skipped: no token of their response is within the cutoff")
        if self.unanswered:
            lines.append(f"{self.source}: {self.unanswered} rows skipped: their answer is empty or missing")
        return "\n".join(lines)


def kind_of(source: str) -> RowKind:
    """Whether a source holds instructions (or chats), or text, by its first row.

    Raises:
        ShortstackError: nothing there, or its first row is neither.
    """
    if source == "embedded":
        return "text"
    file = Path(source_files(source, role="training")[0])
    if suffix_of(file) in TEXT_SUFFIXES:
        return "text"
    for place, row in file_rows(file):
        return "instructions" if is_instruction(_as_object(file, place, row)) else "text"
    raise ShortstackError(f"{file}: no rows", hint="give a source with rows")


def read_instructions(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    cutoff: int,
    prompt: PromptRule = AS_PUBLISHED,
    embedding_rows: int | None = None,
    progress: Progress | None = None,
) -> ExampleSet:
    """Tokenize every row of a source, with the loss on the response alone unless `prompt` counts all.

    Args:
        source: a file, a folder or a hub set of rows with `instruction` (`input`) `output`, or with `messages`.
        tokenizer: of the model that is trained.
        cutoff: tokens after which a row is cut off.
        prompt: what stands around an instruction, and what the loss counts.
        embedding_rows: of the model: larger token ids are refused.
        progress: reports which files of a folder are read.

    Raises:
        ShortstackError: a row is of another kind or holds a token that the model has no embedding for (names file and
            row), or no row has a response within the cutoff.
    """
    from shortstack.data.example_rows import RowsInMaking

    examples = RowsInMaking()
    digest = hashlib.sha256()
    truncated = empty = unanswered = 0
    form = ""
    for file in source_files(source, role="training", progress=progress):
        for place, found in file_rows(Path(file)):
            digest.update(json_text(found, sort_keys=True, default=str).encode())
            where, row = f"{file}, {place}", _as_object(file, place, found)
            form = form or (_form(where, row, tokenizer) if not len(examples) else "")
            if not (len(examples) or empty or unanswered):
                prompt.refuse_idle(source, _prompt_kind(row))
            ids, labels = _labelled(where, row, tokenizer, cutoff, prompt)
            check_ids(tokenizer, ids, embedding_rows, where)
            truncated += len(ids) > cutoff
            if any(label != IGNORED for label in labels[1:cutoff]):
                examples.append(ids[:cutoff], labels[:cutoff])
            elif any(label != IGNORED for label in labels):
                empty += 1
            else:
                unanswered += 1
    if not len(examples):
        why = f"has a token of its response within the cutoff of {cutoff} tokens" if empty else "has an answer"
        raise ShortstackError(
            f"{source}: none of its {empty + unanswered} rows {why}",
            hint="use a larger --cutoff, or other data" if empty else "give other data",
        )
    return ExampleSet(examples.finished(), source, digest.hexdigest(), truncated, empty, unanswered, form)


def labelled_row(
    place: str, row: Chat | Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """(token ids, labels) of a chat or of a row of instruction and output, with the loss on the response.

    Raises:
        ShortstackError: it is neither, or the template refuses it.
    """
    if isinstance(row, Chat):
        return labelled_chat(row, tokenizer)
    return _answer_labelled(place, row, tokenizer, sys.maxsize, AS_PUBLISHED)


def split_off(count: int, validation: int, seed: int) -> tuple[list[int], list[int]]:
    """(training, validation) row numbers of `count` rows: the very split that `datasets.train_test_split` makes.

    Raises:
        ShortstackError: nothing would be left to train on.
    """
    import numpy as np

    if validation >= count:
        raise ShortstackError(
            f"{validation} of {count} rows are for validation: none is left to train on",
            hint="use a smaller --validation",
        )
    order = np.random.default_rng(seed).permutation(count)
    return order[validation:].tolist(), order[:validation].tolist()


def _as_object(file: Path, place: str, row: Any) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise ShortstackError(f"{file}, {place}: expected an object, found {type(row).__name__}")
    if not is_instruction(row) and row_text(row) is None and not isinstance(row.get("input_ids"), list):
        found = ", ".join(map(str, row)) or "nothing"
        pairs = " (these are pairs of answers: write the chosen ones as messages)" if "chosen" in row else ""
        raise ShortstackError(
            f"{file}, {place}: expected instruction and output, messages, or text (found: {found}){pairs}",
            hint="rename the fields, or give other data",
        )
    return row


def is_instruction(row: Mapping[str, Any]) -> bool:
    """Whether a row holds a chat, or an instruction with its output under one of their names."""
    if is_chat(row) or "instruction" in row:
        return True
    return row_text(dict(row)) is None and _fields(row) is not None


def _fields(row: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """(names of a row's instruction, input and output), whichever of their names it has; None where it has none."""
    asked = next((name for name in _ASKED if row.get(name) is not None), None)
    asked = asked or next((name for name in _ASKED if name in row), None)
    answered = next((name for name in _ANSWERED if name in row), None)
    if asked is None or (answered is None and asked != _ASKED[0]):
        return None
    return asked, next((name for name in _GIVEN if name in row), _GIVEN[0]), answered or _ANSWERED[0]


def _form(place: str, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """How a row is read, where its fields have other names than Alpaca's or are more than are used."""
    if is_chat(row):
        used = [name for name in (*CHAT_FIELDS, "prompt", "completion") if row.get(name) is not None]
        used = used[:1] if used[0] in CHAT_FIELDS else used
        chat = chat_of(place, row)
        shown = chat.tools is None or rendered(chat, tokenizer) != rendered(replace(chat, tools=None), tokenizer)
        unused = [name for name in row if name not in (*used, *(["tools"] if shown else []), "system")]
        return f"read as chats: {', '.join(used)}; not used: {', '.join(unused)}" if unused else ""
    names = _fields(row)
    if names is None:
        return ""
    unused = [name for name in row if name not in names]
    if names == ("prompt", names[1], "completion"):
        read = "prompt and completion joined unchanged"
    else:
        read = ", ".join(f"{name} (as {known})" for name, known in zip(names, _ALPACA, strict=True) if name in row)
    plain = names == _ALPACA and not unused
    return "" if plain else f"read: {read}" + (f"; not used: {', '.join(unused)}" if unused else "")


def _prompt_kind(row: Mapping[str, Any]) -> str:
    """What a row is to `PromptRule`."""
    if is_chat(row):
        return "chats"
    names = _fields(row)
    return "joined" if names is not None and (names[0], names[2]) == _JOINED else "instructions"


def _labelled(
    place: str, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, cutoff: int, prompt: PromptRule
) -> tuple[list[int], list[int]]:
    """(token ids, labels) of a row; nothing, or no labels, where it has no answer."""
    ids, labels = _answer_labelled(place, row, tokenizer, cutoff, prompt)
    trains_all = prompt.train_on_inputs and any(label != IGNORED for label in labels)
    return ids, list(ids) if trains_all else labels


def _answer_labelled(
    place: str, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, cutoff: int, prompt: PromptRule
) -> tuple[list[int], list[int]]:
    """(token ids, labels) of a row, with the loss on the answer."""
    if is_chat(row):
        return labelled_chat(chat_of(place, row), tokenizer)
    names = _fields(row) if is_instruction(row) else None
    if names is None:
        raise ShortstackError(f"{place}: a row of text among rows of instructions", hint="keep one kind per source")
    return _instruction(place, row, names, tokenizer, cutoff, prompt)


def _instruction(
    place: str,
    row: Mapping[str, Any],
    names: tuple[str, str, str],
    tokenizer: PreTrainedTokenizerBase,
    cutoff: int,
    prompt: PromptRule,
) -> tuple[list[int], list[int]]:
    """Prompt, response, and the end of text where that fits, tokenized together."""
    asked, given, answered = names
    for name in (asked, answered, *([given] if row.get(given) else [])):
        if not isinstance(row.get(name), str):
            raise ShortstackError(
                f"{place}: {name} is {row.get(name)!r:.60}, expected a string", hint="correct the row"
            )
    if (asked, answered) == _JOINED:
        before, text = row[asked], row[asked] + row[answered]
    else:
        before, text = prompt.prompt_and_text(row[asked], row.get(given) or "", row[answered])
    spans = [(len(before), text)] if row[answered].strip() else []
    ids, labels = labelled(text, spans, lambda part: open_ids(tokenizer, part))
    end = end_of_text(tokenizer) if prompt.add_eos else []
    if spans and len(ids) < cutoff and ids[-1:] != end:
        ids, labels = [*ids, *end], [*labels, *end]
    return ids, labels
