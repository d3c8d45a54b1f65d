"""Data as the loop takes it: batches from any step on, validation batches, and how many steps the data are."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.utils.data import DataLoader

from shortstack.common.options import takes_fields
from shortstack.common.progress import Progress
from shortstack.data.collators import Batch, Examples, Order, Sharding, StepSampler, collated
from shortstack.data.instructions import kind_of, read_instructions, split_off
from shortstack.data.packing import Encoder, PackedStream, Packing
from shortstack.data.row_prompt import AS_PUBLISHED, PromptRule
from shortstack.data.text_stream import open_texts
from shortstack.data.tokenizer import padding_id
from shortstack.errors import ShortstackError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PUBLISHED_VALIDATION = 2000  # rows
_VALIDATION_WINDOWS = 200
_EVALUATED_AT_A_TIME = 8


class Dataset(Protocol):
    """What a run is trained on.

    Attributes:
        described: for records: source, sha256, rows.
        validation: batches that are never trained on.
    """

    described: dict[str, Any]
    validation: list[Batch]

    @property
    def tokens_per_epoch(self) -> int | None:
        """Tokens of one pass; None of a source that is too large to be counted."""

    def tokens(self, steps: int, batch: int) -> int:
        """Tokens that so many steps train on, padding apart."""

    def steps(self, batch: int, *, epochs: float | None, tokens: int | None) -> int:
        """Optimizer steps of so many epochs, or of so many tokens."""

    def loader(
        self, sharding: Sharding, first_step: int, steps: int, stream: dict[str, Any], workers: int
    ) -> Iterable[Batch]:
        """This process's micro-batches from a step on."""


@dataclass
class ExampleDataset:
    """Numbered items, shuffled again in each epoch.

    Attributes:
        items: what `make` puts into batches.
        lengths: of the items, in tokens.
    """

    items: Sequence[Any] = field(repr=False)
    lengths: Sequence[int] = field(repr=False)
    make: Callable[[Sequence[Any]], Batch] = field(repr=False)
    validation: list[Batch] = field(repr=False)
    described: dict[str, Any]
    seed: int
    group_by_length: bool = False
    files: Sequence[int] = ()

    @property
    def tokens_per_epoch(self) -> int | None:
        """Tokens of one pass."""
        return sum(self.lengths)

    def tokens(self, steps: int, batch: int) -> int:
        """Tokens that so many steps train on, padding apart."""
        epochs, rest = divmod(steps * batch, len(self.lengths))
        order, begins = self._order(batch), epochs * len(self.lengths)
        return epochs * sum(self.lengths) + sum(self.lengths[order[begins + place]] for place in range(rest))

    def _order(self, batch: int) -> Order:
        return Order(self.lengths, self.seed, self.group_by_length, batch, self.files)

    def steps(self, batch: int, *, epochs: float | None, tokens: int | None) -> int:
        """Optimizer steps of so many epochs, or of so many tokens."""
        rows = (1 if epochs is None else epochs) * len(self.items)
        if tokens is not None:
            rows = tokens * len(self.lengths) / sum(self.lengths)
        return max(1, math.ceil(rows / batch))

    def loader(
        self, sharding: Sharding, first_step: int, steps: int, stream: dict[str, Any], workers: int
    ) -> Iterable[Batch]:
        """This process's micro-batches from a step on."""
        return DataLoader(
            Examples(self.items, self.make),
            batch_sampler=StepSampler(self._order(sharding.batch), sharding, first_step, steps),
            collate_fn=self.make,
            num_workers=workers,
            # Its own generator: the global one, which dropout uses, must stay as a checkpoint had it.
            generator=torch.Generator().manual_seed(self.seed),
        )


@dataclass
class StreamDataset:
    """Packed windows of text, without end."""

    packing: Packing
    validation: list[Batch] = field(repr=False)
    described: dict[str, Any]
    tokens_per_epoch: int | None

    def tokens(self, steps: int, batch: int) -> int:
        """Tokens that so many steps train on: every window is full."""
        return steps * batch * self.packing.seq_len

    def steps(self, batch: int, *, epochs: float | None, tokens: int | None) -> int:
        """Optimizer steps of so many epochs, or of so many tokens.

        Raises:
            UsageError: epochs of a source that is too large to be counted.
        """
        if tokens is None:
            if self.tokens_per_epoch is None:
                raise UsageError(
                    f"{self.packing.source.source}: too large to count its tokens beforehand",
                    hint="set --tokens, such as 1B, or --max-steps N",
                )
            tokens = math.ceil((1 if epochs is None else epochs) * self.tokens_per_epoch)
        return max(1, math.ceil(tokens / (batch * self.packing.seq_len)))

    def loader(
        self, sharding: Sharding, first_step: int, steps: int, stream: dict[str, Any], workers: int
    ) -> Iterable[Batch]:
        """This process's micro-batches from the saved positions of its streams on."""
        while workers and sharding.accumulation % workers:
            workers -= 1  # each worker makes the same micro-batches of every step
        return _FromWorkers(
            DataLoader(
                PackedStream(self.packing, sharding, stream),
                batch_size=None,
                num_workers=workers,
                generator=torch.Generator().manual_seed(self.packing.seed),
            )
        )


@dataclass(frozen=True)
class _FromWorkers:
    """Batches that may come from other processes; what went wrong there is raised here."""

    batches: Iterable[Batch]

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            if "error" in batch:
                raise batch["error"]
            yield batch


@dataclass(frozen=True)
class DatasetOptions:
    """How examples and windows are made, split and ordered.

    Attributes:
        seq_len: tokens per window, or after which a row is cut off.
        seed: of the split and the shuffling.
        validation: rows or windows that are never trained on; by default some.
        isolated: attention stays within a document.
        group_by_length: rows of like length share a batch.
        embedding_rows: of the model: a row with a larger token id is refused.
        prompt: what stands around an instruction, and what the loss counts.
    """

    seq_len: int = 2048
    seed: int = 42
    validation: int | None = None
    isolated: bool = True
    group_by_length: bool = False
    embedding_rows: int | None = None
    prompt: PromptRule = AS_PUBLISHED


_OPTIONS = DatasetOptions()


@takes_fields
def open_dataset(
    source: str, tokenizer: PreTrainedTokenizerBase, *, options: DatasetOptions = _OPTIONS, progress: Progress
) -> ExampleDataset | StreamDataset:
    """What a SOURCE holds, as a dataset: instructions and chats as examples, text as packed windows.

    Args:
        source: a file, a folder, a hub set, or `embedded`.
        tokenizer: of the model.
        options: how it becomes batches.
        progress: reports what was read and what was skipped.

    Raises:
        ShortstackError: nothing there, a broken row, or too little to hold anything out.
    """
    seq_len, seed, embedding_rows = options.seq_len, options.seed, options.embedding_rows
    is_text = kind_of(source) == "text"
    if is_text and options.group_by_length:
        raise UsageError(f"--group-by-length: no effect on text ({source}), whose windows are equally long")
    if not is_text and not options.isolated:
        raise UsageError(f"--no-isolate-documents: no effect on rows ({source}), which are not packed")
    if is_text:
        options.prompt.refuse_idle(source, "text")
        encoder = Encoder(tokenizer, embedding_rows)
        return _text_dataset(source, encoder, options, progress)
    found = read_instructions(
        source, tokenizer, cutoff=seq_len, prompt=options.prompt, embedding_rows=embedding_rows, progress=progress
    )
    progress.say(found.to_text())
    # No closure: processes that are started afresh (macOS) are sent it.
    make = functools.partial(collated, pad=padding_id(tokenizer, embedding_rows))
    chosen, validation = split_off(len(found.examples), _validation_rows(len(found.examples), options.validation), seed)
    progress.say(f"{len(chosen)} rows to train on, {len(validation)} for validation (split seed {seed})")
    examples = found.examples.chosen(chosen)
    return ExampleDataset(
        examples,
        examples.lengths,
        make,
        in_batches(found.examples.chosen(validation), make),
        found.described(),
        seed,
        options.group_by_length,
    )


def _validation_rows(rows: int, asked: int | None) -> int:
    """As published 2000; of few rows a tenth."""
    if asked is not None:
        return asked
    return _PUBLISHED_VALIDATION if rows >= 10 * _PUBLISHED_VALIDATION else max(1, rows // 10) if rows > 1 else 0


def in_batches(items: Sequence[Any], make: Callable[[Sequence[Any]], Batch]) -> list[Batch]:
    """Items for evaluation, some at a time."""
    step = _EVALUATED_AT_A_TIME
    return [make(items[start : start + step]) for start in range(0, len(items), step)]


def _text_dataset(source: str, encoder: Encoder, options: DatasetOptions, progress: Progress) -> StreamDataset:
    asked = _VALIDATION_WINDOWS if options.validation is None else options.validation
    texts = open_texts(source, progress=progress)
    packing, windows = Packing(texts, encoder, options.seq_len, options.seed, isolated=options.isolated).holding_out(
        asked
    )
    validation = in_batches(windows, _stacked)
    counted = packing.count_tokens()
    tokens = f"{counted} tokens" if counted is not None else "too much to count beforehand"
    progress.say(f"{source}: {tokens}, in windows of {options.seq_len}; {len(windows)} validation windows")
    if asked and not windows:
        progress.say(f"{source}: too little text for a validation set, so there is no validation loss")
    if counted is None and (beyond := encoder.beyond):
        progress.say(
            f"{source}: the embedding has no row for {len(beyond)} tokens of the tokenizer, such as {beyond[0]}; the text "
            "was not searched for them, and a text with one ends the run"
        )
    dataset = StreamDataset(packing, validation, packing.source.described(), counted)
    if counted == 0 and not windows:
        raise ShortstackError(f"{source}: no usable text (empty or blank)", hint="give a source with text")
    if counted == 0:
        raise UsageError(f"{source}: nothing is left to train on", hint="use --validation 0, or more text")
    return dataset


def _stacked(windows: Sequence[Batch]) -> Batch:
    return {key: torch.stack([window[key] for window in windows]) for key in windows[0]}
