"""Texts -> windows of token ids: the published procedure by name, and a default that does not waste text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from shortstack.checkpoint.reader import Checkpoint
from shortstack.checkpoint.tokenizer_files import ChosenTokenizer
from shortstack.common.options import Options, takes_fields
from shortstack.data.chats import rendered
from shortstack.data.counted_rows import CountedRows
from shortstack.data.counted_tokens import Encoder, ResponseEncoder, TextEncoder, separated
from shortstack.data.marks import marks_of
from shortstack.data.preview import READ_BYTES
from shortstack.data.sources import Corpus, read_corpus
from shortstack.errors import ShortstackError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Sampling = Literal["documents", "published", "joined"]

# Documents are tokenized until there is this many times the text that is needed: enough to draw from, not all of C4.
_TEXT_TO_DRAW_FROM = 50
# Rows that are read together where they are counted first: few where most are long enough, many where hardly any is.
_FEWEST_AHEAD, _MOST_AHEAD = 16, 8192
_DRAWS = 100  # of a window, until one holds a token that counts
_JOINED_ROWS = 5000  # of a set, as published for GPTQ on C4
_MOST_LOOKED_AT = 32 << 20  # bytes, before anything runs
_SPECIAL_TOKENS = 2  # of a document


@dataclass(frozen=True)
class CalibrationOptions(Options):
    """The windows of text that scores are computed on.

    Attributes:
        data: The source of the calibration text: `embedded`, a .txt, .jsonl, .json or .parquet file, a folder, or a
            data set on the hub such as `bookcorpus`. `self:PROMPTS` uses continuations that the model generates from
            the prompts in such a source. Several sources need names: `general=books.txt,code=src.jsonl`.
        samples: The number of calibration windows; with several sources, of each.
        seq_len: The number of tokens in a calibration window.
        seed: The seed of the generator that draws the calibration windows.
        sampling: How the windows are drawn: `documents` draws them from documents that are long enough, or from joined
            rows; `published` draws them as Shortened LLaMA does; `joined` draws them anywhere in the first 5000 rows
            joined by blank lines, as published for GPTQ.
        bos_every: Begin every window with BOS, as published for Gemma.
        chat_template: Render rows of `messages` through the tokenizer's chat template.
        count_prompts: Count the tokens of prompts in losses, too. By default only responses count in rows of chats and
            instructions, as in retraining.
    """

    data: str = "embedded"
    samples: int = 10
    seq_len: int = 128
    seed: int = 1234
    sampling: Sampling = "documents"
    bos_every: bool = False
    chat_template: bool = False
    count_prompts: bool = False


_OPTIONS = CalibrationOptions()


@dataclass(frozen=True)
class CalibrationSet:
    """Windows of token ids, all of one length, and how they were drawn.

    Attributes:
        windows: token ids, [number of windows][seq_len].
        record: what scores.json says about it.
        sources: of each window the name of its source; empty where the text has one source without a name.
        counted: which tokens of each window count in its loss; None for all that are predicted.
    """

    windows: list[list[int]]
    record: dict[str, Any]
    sources: tuple[str, ...] = ()
    counted: list[list[bool]] | None = None

    @property
    def places(self) -> dict[str, list[int]]:
        """Of each named source, the places of its windows."""
        return {
            name: [place for place, other in enumerate(self.sources) if other == name]
            for name in dict.fromkeys(self.sources)
        }

    def read_by(self, chosen: ChosenTokenizer | None) -> CalibrationSet:
        """With the tokenizer that was chosen in place of the checkpoint's own in the record."""
        if chosen is None:
            return self
        return replace(self, record={**self.record, "tokenizer": chosen.described()})

    def first(self, samples: int) -> CalibrationSet:
        """The first of them alone, of each named source as many."""
        each = self.places.values() if self.sources else [range(len(self.windows))]
        return self.some([place for places in each for place in places[:samples]])

    def halves(self) -> tuple[CalibrationSet, CalibrationSet]:
        """The first and the second half of each source's windows; sources take turns, so that the first few have all."""
        mixed, texts = self.taking_turns(), max(1, len(self.places))
        half = len(mixed.windows) // texts // 2 * texts
        return mixed.some(range(half)), mixed.some(range(half, 2 * half))

    def taking_turns(self) -> CalibrationSet:
        """The first window of each named source, then the second of each, and so on: as many as the shortest source has."""
        if not self.sources:
            return self
        return self.some([place for places in zip(*self.places.values(), strict=False) for place in places])

    def some(self, places: Sequence[int]) -> CalibrationSet:
        """Some of them."""
        windows, names = [self.windows[place] for place in places], len(dict.fromkeys(self.sources)) or 1
        return CalibrationSet(
            windows,
            {**self.record, "samples": len(windows) // names, "marks": marks_of(windows)},
            tuple(self.sources[place] for place in places) if self.sources else (),
            None if self.counted is None else [self.counted[place] for place in places],
        )


@takes_fields
def draw_windows(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    options: CalibrationOptions = _OPTIONS,
    fewest: int | None = None,
) -> CalibrationSet:
    """Draw calibration windows from texts.

    `published` draws a row uniformly, tokenizes it with special tokens, rejects it if it is shorter than a window or was
    used, and draws a start uniformly (Shortened LLaMA, section "calibration"). `documents` cuts every document that is long
    enough into windows at a random offset and draws among them; where these are too few, all rows joined by blank lines
    are cut instead. `joined` joins the first 5000 rows by blank lines and draws starts uniformly. With `bos_every` texts are
    tokenized without special tokens.

    Args:
        corpus: the texts; of rows of `input_ids` the first `samples` are used unchanged, in order.
        tokenizer: turns text into ids; not needed for rows of `input_ids`.
        options: how many windows, how long, and how they are drawn; `data` is not looked at.
        fewest: so many are enough where the text has no more; by default `samples`.

    Raises:
        ShortstackError: too little text (says how many tokens are needed and how many there are), no BOS token, or no
            chat template.
    """
    samples, seq_len, bos_every = options.samples, options.seq_len, options.bos_every
    if samples < 1 or seq_len < 2:
        raise ShortstackError(f"{samples} windows of {seq_len} tokens: expected at least 1 window of at least 2 tokens")
    record: dict[str, Any] = {**corpus.described(), "samples": samples, "seq_len": seq_len}
    if corpus.windows:
        if fewest is not None:
            samples = max(fewest, min(samples, len(corpus.windows)))
        windows = _given_windows(corpus, samples)
        record |= {"samples": samples, "seq_len": len(windows[0]), "sampling": "as given", "marks": marks_of(windows)}
        return CalibrationSet(windows, record)
    if tokenizer is None:
        raise ShortstackError(
            f"{corpus.source}: text needs a tokenizer", hint="name one with --tokenizer, or give rows of input_ids"
        )
    if bos_every and tokenizer.bos_token_id is None:
        raise ShortstackError("--bos-every: the tokenizer has no BOS token", hint="leave --bos-every out")
    documents, encoder = _documents(corpus, tokenizer, options)
    draw = {"published": _published, "documents": _from_documents, "joined": _joined}[options.sampling]
    text = _Text(corpus.source, documents, encoder, fewest)
    windows, counted = separated(encoder, draw(text, samples, seq_len, random.Random(options.seed)))
    counted = None if options.count_prompts else counted
    if bos_every:
        windows = [[int(tokenizer.bos_token_id), *window[:-1]] for window in windows]
        counted = counted and [[False, *row[:-1]] for row in counted]
    record |= {
        "samples": len(windows),
        "sampling": options.sampling,
        "seed": options.seed,
        "bos_every": bos_every,
        "chat_template": options.chat_template,
    }
    if corpus.chats or corpus.instructions or corpus.written:
        record["counted"] = "all" if counted is None else "responses"
    if counted is not None:
        record["counted_tokens"] = sum(map(sum, counted))
    return CalibrationSet(windows, {**record, "marks": marks_of(windows)}, counted=counted)


def check_enough(options: CalibrationOptions) -> None:
    """Look, without a tokenizer, at whether a local text can hold the windows: a token takes a byte at least.

    Raises:
        ShortstackError: it cannot, or cannot be read.
    """
    wanted = options.samples * options.seq_len
    limit = max(READ_BYTES, min(wanted + 1, _MOST_LOOKED_AT))
    corpus = read_corpus(options.data, role="calibration", limit_bytes=limit, answered=True)
    nbytes = sum(len(document.encode()) + _SPECIAL_TOKENS for document in corpus.documents)
    if corpus.documents and nbytes < min(wanted, _MOST_LOOKED_AT):
        raise ShortstackError(
            f"{corpus.source}: {options.samples} windows of {options.seq_len} tokens need {wanted} tokens, "
            f"and {nbytes} bytes hold fewer",
            hint="use fewer --samples, a smaller --seq-len, or more text",
        )


def check_windows(checkpoint: Checkpoint, windows: Sequence[Sequence[int]]) -> None:
    """Refuse windows that are longer than the model's positions or hold ids that it has no embedding for."""
    length, positions = len(windows[0]), checkpoint.positions
    if positions is not None and length > positions:
        raise ShortstackError(
            f"windows of {length} tokens, but {checkpoint.source} has {positions} positions",
            hint=f"--seq-len {positions}",
        )
    rows = checkpoint.tensors[checkpoint.anatomy.embedding].shape[0]
    largest = max(max(window) for window in windows)
    if largest >= rows:
        raise ShortstackError(
            f"{checkpoint.source}: token id {largest} in the windows, but the embedding has {rows} rows",
            hint="the tokenizer does not belong to this model",
        )


def _given_windows(corpus: Corpus, samples: int) -> list[list[int]]:
    if len(corpus.windows) < samples:
        raise ShortstackError(
            f"{corpus.source}: {samples} windows needed, found {len(corpus.windows)} rows of input_ids",
            hint=f"--samples {len(corpus.windows)}, or give more rows",
        )
    windows = list(corpus.windows[:samples])
    lengths = sorted({len(window) for window in windows})
    if len(lengths) != 1 or lengths[0] < 2:
        raise ShortstackError(f"{corpus.source}: rows of input_ids must be of one length, found lengths {lengths}")
    return windows


def _documents(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, options: CalibrationOptions
) -> tuple[Sequence[Any], Encoder]:
    """What windows are drawn from, and what makes token ids of it."""
    responses = ResponseEncoder(tokenizer, options.bos_every)
    if corpus.written:
        return corpus.written, responses
    text = TextEncoder(tokenizer, special_tokens=not options.bos_every and not options.chat_template)
    if not options.chat_template:
        if corpus.chats:
            raise ShortstackError(
                f"{corpus.source}: rows are chats (messages)", hint="use --chat-template to render them"
            )
        return (corpus.instructions, responses) if corpus.instructions else (corpus.documents, text)
    if not corpus.chats:
        raise ShortstackError(f"{corpus.source}: no rows of messages for --chat-template", hint="leave the option out")
    if not tokenizer.chat_template:
        raise ShortstackError("--chat-template: the tokenizer has no chat template", hint="give plain text instead")
    if not options.count_prompts:
        return corpus.chats, responses
    if isinstance(corpus.chats, CountedRows):
        return corpus.chats.mapped(lambda chat: rendered(chat, tokenizer)), text
    return [rendered(chat, tokenizer) for chat in corpus.chats], text


@dataclass(frozen=True)
class _Text:
    """What windows are drawn from.

    Attributes:
        source: its name.
        documents: rows of any kind.
        encode: makes token ids of one.
        fewest: so many windows are enough where the text has no more; None for all that are wanted.
    """

    source: str
    documents: Sequence[Any]
    encode: Encoder
    fewest: int | None


def _published(text: _Text, samples: int, seq_len: int, generator: random.Random) -> list[list[int]]:
    documents, encode = text.documents, text.encode
    seen: set[int] = set()  # what is long enough is used immediately, so that no row is needed twice
    tokens = 0
    windows: list[list[int]] = []
    ahead = _FEWEST_AHEAD
    while len(windows) < samples:
        # Drawing never ends when too few rows are long enough: once all have been seen, it is known whether so.
        if len(seen) == len(documents):
            samples = max(text.fewest or samples, len(windows))
            if len(windows) < samples:
                raise ShortstackError(
                    f"{text.source}: the published sampling needs {samples} rows of at least {seq_len} tokens, "
                    f"{len(windows)} of {len(documents)} rows are ({tokens} tokens in all)",
                    hint="use --sampling documents, which joins short rows",
                )
            continue
        if isinstance(documents, CountedRows):
            ahead = _fetched_ahead(documents, generator, seen, ahead)
        index = generator.randint(0, len(documents) - 1)
        if index in seen:
            continue
        seen.add(index)
        row = encode(documents[index])
        tokens += len(row)
        if len(row) < seq_len:
            continue
        start = generator.randint(0, len(row) - seq_len)
        window = row[start : start + seq_len]
        if not encode.counts(window):
            continue
        windows.append(window)
        ahead = max(_FEWEST_AHEAD, ahead // 4)
    return windows


def _fetched_ahead(documents: CountedRows, generator: random.Random, seen: set[int], count: int) -> int:
    """Read the next rows that are drawn if all of them are too short, together; how many to read the next time.

    The generator stays where it is. Rows that are drawn after one that is long enough are others, and are read again.
    """
    following = random.Random()
    following.setstate(generator.getstate())
    last = len(documents) - 1
    index = following.randint(0, last)
    if index in seen or documents.holds(index):
        return count
    drawn = [index, *(following.randint(0, last) for _ in range(count - 1))]
    documents.fetch([number for number in drawn if number not in seen])
    return min(2 * count, _MOST_AHEAD)


def _from_documents(text: _Text, samples: int, seq_len: int, generator: random.Random) -> list[list[int]]:
    documents, encode = text.documents, text.encode
    order = list(range(len(documents)))
    generator.shuffle(order)
    pool: list[list[int]] = []
    tokens = 0
    for index in order:
        row = encode(documents[index])
        tokens += len(row)
        pool.extend(filter(encode.counts, _cut(row, seq_len, generator)))
        if len(pool) >= samples * _TEXT_TO_DRAW_FROM:
            break
    if len(pool) < samples and len(documents) > 1:
        row = encode.joined(documents)
        tokens = len(row)
        spare = generator if len(row) // seq_len > samples else None
        pool = list(filter(encode.counts, _cut(row, seq_len, spare)))
    if len(pool) < samples and len(documents) == 1:
        pool = list(filter(encode.counts, _cut(encode(documents[0]), seq_len, None)))
    samples = max(text.fewest or samples, min(samples, len(pool)))
    if len(pool) < samples:
        raise ShortstackError(
            f"{text.source}: {samples} windows of {seq_len} tokens need {samples * seq_len} tokens, found {tokens}",
            hint=encode.too_little + (f", or --samples {len(pool)}" if pool else ", or a smaller --seq-len"),
        )
    return generator.sample(pool, samples)


def _joined(text: _Text, samples: int, seq_len: int, generator: random.Random) -> list[list[int]]:
    encode = text.encode
    row = encode.joined(text.documents[:_JOINED_ROWS])
    # Windows may overlap; with less text than they hold together, most of them would.
    samples = max(text.fewest or samples, min(samples, len(row) // seq_len))
    if len(row) < samples * seq_len:
        raise ShortstackError(
            f"{text.source}: {samples} windows of {seq_len} tokens need {samples * seq_len} tokens, found {len(row)}",
            hint=f"{encode.too_little}, or fewer --samples",
        )
    windows: list[list[int]] = []
    for _ in range(_DRAWS * samples):
        start = generator.randint(0, len(row) - seq_len)
        if encode.counts(row[start : start + seq_len]):
            windows.append(row[start : start + seq_len])
        if len(windows) == samples:
            return windows
    raise ShortstackError(
        f"{text.source}: hardly any run of {seq_len} tokens holds a token of a response",
        hint="use a larger --seq-len, or other data",
    )


def _cut(row: Sequence[int], seq_len: int, generator: random.Random | None) -> list[list[int]]:
    """Windows side by side; the offset of the first one is drawn, or 0 without a generator."""
    spare = len(row) % seq_len
    first = generator.randint(0, spare) if generator is not None and len(row) >= seq_len else 0
    return [list(row[start : start + seq_len]) for start in range(first, len(row) - seq_len + 1, seq_len)]
