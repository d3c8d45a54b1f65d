"""Text -> packed windows, as a stream that any number of processes and workers share and that starts anywhere.

Documents are cut into pieces of a few windows. Pieces are shuffled in groups and distributed over *data streams*,
one for each position in the global batch. A stream joins its pieces (BOS, text, end of text) and cuts windows from them.
Stream n fills position n of every batch, whichever process or worker runs it. A process reads all rows, but tokenizes
only the pieces of its own streams. The position of a stream is a few numbers, which a checkpoint saves.
"""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from shortstack.data.collators import Batch, Sharding
from shortstack.data.instructions import IGNORED
from shortstack.data.text_stream import START, Place, TextSource
from shortstack.data.tokenizer import check_ids, end_of_text
from shortstack.errors import ShortstackError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GROUP = 1024  # pieces that are shuffled together
_PIECE_WINDOWS = 4  # windows that a piece is about as long as
_CHARACTERS_PER_TOKEN = 4
_VALIDATION_EVERY = 20  # of the first pieces every 20th is for validation, as many as are needed
_COUNTED = 64 << 20  # bytes of text that are tokenized whole to learn how many tokens they are


class Encoder:
    """Pieces -> token ids: BOS in front where the tokenizer puts one, end of text behind a document.

    Args:
        tokenizer: of the model.
        embedding_rows: of the model: larger ids are refused.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, embedding_rows: int | None = None) -> None:
        self._tokenizer = tokenizer
        self._rows = embedding_rows
        bos = tokenizer.bos_token_id
        puts_bos = bos is not None and list(tokenizer("a", verbose=False)["input_ids"])[:1] == [bos]
        self._before = [int(bos)] if puts_bos and bos is not None else []
        self._after = end_of_text(tokenizer)

    def __call__(self, text: str, ends: bool) -> list[int]:
        """The ids of one piece."""
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return [*self._before, *ids, *(self._after if ends else [])]

    @property
    def beyond(self) -> list[str]:
        """Tokens of the tokenizer that the embedding has no row for."""
        if self._rows is None:
            return []
        return [token for token, number in self._tokenizer.get_added_vocab().items() if number >= self._rows]

    def check(self, ids: list[int], source: TextSource, after: Place) -> None:
        """Refuse a piece with a token that the model has no embedding for."""
        if self._rows is not None and max(ids, default=-1) >= self._rows:
            check_ids(self._tokenizer, ids, self._rows, source.where(after))


@dataclass(frozen=True)
class Packing:
    """How windows are made of a source.

    Attributes:
        source: the texts.
        encode: pieces -> ids.
        seq_len: tokens per window.
        seed: of the shuffling.
        validation_before: of the pieces before this one every 20th is for validation and never trained on.
        isolated: whether attention is to stay within a document (positions start again in each).
    """

    source: TextSource
    encode: Encoder
    seq_len: int
    seed: int
    validation_before: int = 0
    isolated: bool = True

    @property
    def characters(self) -> int:
        """Characters of a piece."""
        return _PIECE_WINDOWS * _CHARACTERS_PER_TOKEN * self.seq_len

    def is_validation(self, number: int) -> bool:
        """Whether piece `number` of the source is for validation."""
        return number % _VALIDATION_EVERY == _VALIDATION_EVERY // 2 and number < self.validation_before

    def holding_out(self, windows: int) -> tuple[Packing, list[Batch]]:
        """(the same without the pieces that so many windows are made of, those windows): fewer, where text is short."""
        everywhere = replace(self, validation_before=sys.maxsize)
        stream = _DataStream(0)
        found: list[Batch] = []
        last = 0
        for number, (after, text, ends) in enumerate(self.source.pieces(self.characters)):
            if len(found) >= windows:
                break
            if everywhere.is_validation(number):
                last = number + 1
                stream.add(number, self.encoded(after, text, ends), ())
            while stream.tokens >= self.seq_len and len(found) < windows:
                found.append(self.window(*stream.take(self.seq_len)))
        return replace(self, validation_before=last), found

    def count_tokens(self) -> int | None:
        """Tokens in one pass over what is trained on; None where that is too much to count."""
        if self.source.nbytes is None or self.source.nbytes > _COUNTED:
            return None
        pieces = enumerate(self.source.pieces(self.characters))
        return sum(len(self.encoded(*piece)) for n, piece in pieces if not self.is_validation(n))

    def encoded(self, after: Place, text: str, ends: bool) -> list[int]:
        """The ids of one piece of the source.

        Raises:
            ShortstackError: the model has no embedding for one of them (names file and row).
        """
        ids = self.encode(text, ends)
        self.encode.check(ids, self.source, after)
        return ids

    def window(self, ids: list[int], starts: list[int]) -> Batch:
        """One window: input_ids, position_ids, targets, [T]; `starts` are the places where a document begins."""
        ids_T = torch.tensor(ids)
        targets_T = torch.cat([ids_T[1:], torch.tensor([IGNORED])])
        positions_T = torch.arange(len(ids))
        for start in starts:
            if start > 0:
                targets_T[start - 1] = IGNORED  # a new document does not follow from the one before it
                if self.isolated:
                    positions_T[start:] = torch.arange(len(ids) - start)
        return {"input_ids": ids_T, "position_ids": positions_T, "targets": targets_T}


@dataclass
class _DataStream:
    """One place of the global batch: the pieces that are to be cut into its next windows."""

    number: int
    next_piece: int = 0  # pieces before this one have been used up
    offset: int = 0  # tokens of `next_piece` that have been used up
    queue: deque[tuple[int, list[int], tuple[Any, ...]]] = field(default_factory=deque)
    tokens: int = 0

    def add(self, piece: int, ids: list[int], group: tuple[Any, ...]) -> None:
        self.queue.append((piece, ids, group))
        self.tokens += len(ids) - (self.offset if piece == self.next_piece else 0)
        if len(self.queue) == 1 and piece != self.next_piece:
            self.next_piece, self.offset = piece, 0

    def take(self, length: int) -> tuple[list[int], list[int]]:
        """The next `length` tokens, and where in them a piece begins."""
        ids: list[int] = []
        starts: list[int] = []
        while len(ids) < length:
            _, piece, _ = self.queue[0]
            if self.offset == 0:
                starts.append(len(ids))
            part = piece[self.offset : self.offset + length - len(ids)]
            ids += part
            self.offset += len(part)
            if self.offset == len(piece):
                finished, *_ = self.queue.popleft()
                self.next_piece = self.queue[0][0] if self.queue else finished + 1
                self.offset = 0
        self.tokens -= length
        return ids, starts

    def state(self) -> dict[str, Any] | None:
        """Where it stands; None where its next piece has not been read yet."""
        if not self.queue:
            return None
        return {"piece": self.next_piece, "offset": self.offset, "group": list(self.queue[0][2])}


class PackedStream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """The micro-batches of one process, step after step, without end; each carries the positions of its streams after it.

    Args:
        packing: how windows are made.
        sharding: the positions in the global batch that belong to this process.
        state: stream -> its position, from a checkpoint; a stream that is not in it starts at the beginning.
    """

    def __init__(self, packing: Packing, sharding: Sharding, state: dict[str, Any] | None = None) -> None:
        self._packing = packing
        self._sharding = sharding
        self._state = state or {}

    def __iter__(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        slots = self._sharding.slots()[number::count]
        streams = {place: self._stream_of(place) for slot in slots for place in slot}
        reader = self._reader(streams)
        try:
            while True:
                for slot in slots:
                    yield self._micro_batch([streams[place] for place in slot], streams, reader)
        except ShortstackError as error:
            if worker is None:
                raise
            yield {"error": error}  # raised in a worker it would arrive with a traceback for its text

    def _micro_batch(self, chosen: list[_DataStream], streams: dict[int, _DataStream], reader: Iterator[Any]) -> Batch:
        windows = []
        for stream in chosen:
            # One token more than a window: so that where it stands next is known.
            while stream.tokens <= self._packing.seq_len:
                piece, (after, text, ends), group = next(reader)
                owner = streams.get(piece % self._sharding.batch)
                if owner is not None and piece >= owner.next_piece:
                    owner.add(piece, self._packing.encoded(after, text, ends), group)
            windows.append(self._packing.window(*stream.take(self._packing.seq_len)))
        batch: Batch = {key: torch.stack([window[key] for window in windows]) for key in windows[0]}
        batch["stream"] = {str(stream.number): stream.state() for stream in chosen}
        return batch

    def _stream_of(self, number: int) -> _DataStream:
        saved = self._state.get(str(number))
        return _DataStream(number, saved["piece"], saved["offset"]) if saved else _DataStream(number)

    def _reader(
        self, streams: dict[int, _DataStream]
    ) -> Iterator[tuple[int, tuple[Place, str, bool], tuple[Any, ...]]]:
        """(number, piece, its group) of pieces, from the earliest group that a stream needs."""
        groups = [self._state[str(place)]["group"] if str(place) in self._state else None for place in streams]
        known = [group for group in groups if group is not None]
        begin = min(known, key=lambda group: group[0]) if len(known) == len(groups) else None
        # A group: (number of its first piece, epoch, how many pieces of the source came before it, where it begins).
        first, epoch, before, place = begin if begin is not None else (0, 0, 0, START)
        while True:
            texts = self._packing.source.pieces(self._packing.characters, tuple(place))
            exhausted = False
            while not exhausted:
                group = (first, epoch, before, place)
                members: list[tuple[Place, str, bool]] = []
                while len(members) < _GROUP:
                    found = next(texts, None)
                    if found is None:
                        exhausted = True
                        break
                    place = found[0]
                    if not self._packing.is_validation(before):
                        members.append(found)
                    before += 1
                random.Random(f"{self._packing.seed}:{epoch}:{group[2]}").shuffle(members)
                for member in members:
                    yield first, member, group
                    first += 1
            if first == 0:
                raise ShortstackError(f"{self._packing.source.source}: no usable text (empty or blank)")
            epoch, before, place = epoch + 1, 0, START
