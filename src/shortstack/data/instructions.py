"""Rows -> examples: instructions and chats with the loss on the response alone, windows of token ids as they stand.

What the rows hold decides what a source is: `instruction`/`input`/`output` or `messages` are examples, one a row; rows
of text and text files are packed into windows (`packing.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from shortstack.common.json_text import json_text
from shortstack.data.sources import TEXT_SUFFIXES, file_rows, row_text, source_files, suffix_of
from shortstack.errors import ShortstackError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of a token that is not predicted, as torch's cross entropy has it

RowKind = Literal["instructions", "text"]

# The Alpaca prompt (tatsu-lab/stanford_alpaca, Apache-2.0), which the published models were trained and are prompted with.
_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Example:
    """One row as token ids.

    Attributes:
        ids: the tokens, prompt and response.
        labels: the same, with `IGNORED` for tokens that are not predicted.
    """

    ids: list[int]
    labels: list[int]

    @property
    def predicted(self) -> int:
        """Tokens that the loss counts; the first token of all is never predicted."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class ExampleSet:
    """Examples and what is known of them.

    Attributes:
        examples: in the order of the rows.
        source: what the user called them.
        sha256: of the rows as they were read.
        truncated: how many were longer than the cutoff.
        empty: how many were left out, because nothing of their response lies within the cutoff.
    """

    examples: list[Example] = field(repr=False)
    source: str
    sha256: str
    truncated: int = 0
    empty: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of all examples."""
        return sum(len(example.ids) for example in self.examples)

    @property
    def predicted(self) -> int:
        """Tokens that the loss counts."""
        return sum(example.predicted for example in self.examples)

    def described(self) -> dict[str, Any]:
        """What a record says about the data."""
        return {"source": self.source, "sha256": self.sha256, "rows": len(self.examples) + self.empty}

    def to_text(self) -> str:
        """What to know before training on them."""
        rows = len(self.examples) + self.empty
        masked = 1 - self.predicted / max(1, self.tokens)
        lines = [
            f"{self.source}: {rows} rows, {self.tokens} tokens; {self.truncated / rows:.1%} of the rows truncated, "
            f"{masked:.1%} of the tokens masked (prompts)"
        ]
        if self.empty:
            lines.append(f"{self.source}: {self.empty} rows left out: nothing of their response is within the cutoff")
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
        return "instructions" if _is_instruction(_as_object(file, place, row)) else "text"
    raise ShortstackError(f"{file}: no rows", hint="give a source that holds rows")


def read_instructions(source: str, tokenizer: PreTrainedTokenizerBase, *, cutoff: int) -> ExampleSet:
    """Tokenize every row of a source, with the loss on the response alone.

    Args:
        source: a file, a folder or a hub set of rows with `instruction` (`input`) `output`, or with `messages`.
        tokenizer: of the model that is trained.
        cutoff: tokens after which a row is cut off.

    Raises:
        ShortstackError: a row is of another kind (names file and row), or no row has a response within the cutoff.
    """
    examples: list[Example] = []
    digest = hashlib.sha256()
    truncated = empty = 0
    for file in source_files(source, role="training"):
        for place, row in file_rows(Path(file)):
            digest.update(json_text(row, sort_keys=True, default=str).encode())
            example, was_cut = _example(f"{file}, {place}", _as_object(file, place, row), tokenizer, cutoff)
            truncated += was_cut
            if example.predicted:
                examples.append(example)
            else:
                empty += 1
    if not examples:
        raise ShortstackError(
            f"{source}: none of its {empty} rows has a token of its response within the cutoff of {cutoff} tokens",
            hint="a larger --cutoff, or other data",
        )
    return ExampleSet(examples, source, digest.hexdigest(), truncated, empty)


def split_off(count: int, held_out: int, seed: int) -> tuple[list[int], list[int]]:
    """(training, held out) row numbers of `count` rows: the very split that `datasets.train_test_split` makes.

    Raises:
        ShortstackError: nothing would be left to train on.
    """
    import numpy as np

    if held_out >= count:
        raise ShortstackError(f"{held_out} of {count} rows to be held out: none would be left", hint="--validation N")
    order = np.random.default_rng(seed).permutation(count)
    return order[held_out:].tolist(), order[:held_out].tolist()


def _as_object(file: Path, place: str, row: Any) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise ShortstackError(f"{file}, {place}: expected an object, found {type(row).__name__}")
    if not _is_instruction(row) and row_text(row) is None and not isinstance(row.get("input_ids"), list):
        found = ", ".join(map(str, row)) or "nothing"
        raise ShortstackError(
            f"{file}, {place}: expected instruction and output, messages, or text (found: {found})",
            hint="rename the fields, or give other data",
        )
    return row


def _is_instruction(row: Mapping[str, Any]) -> bool:
    return "instruction" in row or "messages" in row


def _example(
    place: str, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, cutoff: int
) -> tuple[Example, bool]:
    if "messages" in row:
        ids, labels = _chat(place, row["messages"], tokenizer)
    elif "instruction" in row:
        ids, labels = _instruction(place, row, tokenizer, cutoff)
    else:
        raise ShortstackError(f"{place}: a row of text among rows of instructions", hint="keep one kind per source")
    return Example(ids[:cutoff], labels[:cutoff]), len(ids) > cutoff


def _instruction(
    place: str, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, cutoff: int
) -> tuple[list[int], list[int]]:
    """Prompt, response, and the end of text where that fits: tokenized together, masked by the prompt's own length."""
    for key in ("instruction", "output"):
        if not isinstance(row.get(key), str):
            raise ShortstackError(f"{place}: {key} is {row.get(key)!r:.60}, expected a string", hint="correct the row")
    template = _PROMPT_WITH_INPUT if row.get("input") else _PROMPT
    prompt = template.format_map({"instruction": row["instruction"], "input": row.get("input", "")})
    ids = _encoded(tokenizer, prompt + row["output"])
    masked = len(_encoded(tokenizer, prompt))
    if len(ids) < cutoff and tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(int(tokenizer.eos_token_id))
    return ids, [IGNORED] * min(masked, len(ids)) + ids[masked:]


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    # Some tokenizers end every text themselves; a prompt goes on.
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _chat(place: str, messages: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The chat through the tokenizer's template; the loss on what the assistant says, its end of turn included."""
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        raise ShortstackError(f"{place}: messages is no list of objects", hint="correct the row")
    if not getattr(tokenizer, "chat_template", None):
        raise ShortstackError(f"{place}: messages need a chat template, and the tokenizer has none")

    def rendered(turns: Sequence[Any], *, prompt: bool) -> list[int]:
        try:
            text = tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # templates raise what they like
            raise ShortstackError(f"{place}: the chat template refuses these messages: {error}") from None
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    ids = rendered(messages, prompt=False)
    labels = [IGNORED] * len(ids)
    for number, turn in enumerate(messages):
        if turn.get("role") != "assistant":
            continue
        before, after = rendered(messages[:number], prompt=True), rendered(messages[: number + 1], prompt=False)
        if ids[: len(before)] != before or ids[: len(after)] != after:
            raise ShortstackError(
                f"{place}: the chat template renders earlier turns differently once there are later ones",
                hint="keep one answer per row",
            )
        labels[len(before) : len(after)] = ids[len(before) : len(after)]
    return ids, labels
