"""Examples -> batches, in an order that the number of processes does not change.

One global batch after the other is taken from an endless sequence of epochs, each in its own seeded order; a process
takes its share of every global batch. So any step can be the first one (a resumed run reads nothing over again), and one
process sees in a step what several see together.

Legend: B examples, T tokens, K teacher's top tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shortstack.data.answers import IGNORED
from shortstack.data.example_rows import Example
from shortstack.errors import UsageError

Batch = dict[str, Any]
FILES_MIXED = 8  # files whose examples are shuffled together
_PAD_TO = 8  # tokens: lengths that matrix units like, as published


@dataclass(frozen=True)
class Sharding:
    """How a global batch is divided: over processes, and over the micro-batches of each.

    Attributes:
        batch: examples per optimizer step, over all processes.
        micro_batch: examples that are run at a time in one process.
        rank, world: this process, and how many there are.
    """

    batch: int
    micro_batch: int
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.batch < 1 or self.micro_batch < 1:
            raise UsageError(f"--batch {self.batch} --micro-batch {self.micro_batch}: expected at least 1 each")
        if self.batch % (self.micro_batch * self.world):
            raise UsageError(
                f"--batch {self.batch} is not a multiple of {self.micro_batch} (--micro-batch) x {self.world} processes",
                hint=f"--batch {-(-self.batch // (self.micro_batch * self.world)) * self.micro_batch * self.world}",
            )

    @property
    def accumulation(self) -> int:
        """Micro-batches per step in one process."""
        return self.batch // (self.micro_batch * self.world)

    def slots(self) -> list[range]:
        """For each micro-batch of this process, its places in the global batch."""
        first = self.rank * self.accumulation * self.micro_batch
        return [
            range(first + number * self.micro_batch, first + (number + 1) * self.micro_batch)
            for number in range(self.accumulation)
        ]


@dataclass
class Order:
    """The endless sequence of example numbers: epoch after epoch, each shuffled on its own.

    Attributes:
        lengths: of the examples, in tokens.
        seed: of the shuffling.
        group_by_length: examples of like length are put into one batch (within 50 batches, so that epochs stay mixed).
        batch: examples per step, for the grouping.
        files: how many examples each file holds, where they are read from files: then a few files at a time are mixed,
            in a shuffled order of files, so that none is read over and over.
    """

    lengths: Sequence[int]
    seed: int
    group_by_length: bool = False
    batch: int = 1
    files: Sequence[int] = ()

    def __post_init__(self) -> None:
        self._epochs: dict[int, list[int]] = {}

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, len(self.lengths))
        if epoch not in self._epochs:
            self._epochs = {epoch - 1: self._epochs.get(epoch - 1, []), epoch: self._shuffled(epoch)}
            self._epochs = {key: order for key, order in self._epochs.items() if order}
        return self._epochs[epoch][place]

    def _shuffled(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = self._by_files(generator) if self.files else _permuted(range(len(self.lengths)), generator)
        if not self.group_by_length:
            return order
        span = 50 * self.batch
        parts = [sorted(order[at : at + span], key=lambda n: -self.lengths[n]) for at in range(0, len(order), span)]
        return [number for part in parts for number in part]

    def _by_files(self, generator: torch.Generator) -> list[int]:
        starts = [sum(self.files[:number]) for number in range(len(self.files))]
        files = _permuted(range(len(self.files)), generator)
        order: list[int] = []
        for at in range(0, len(files), FILES_MIXED):
            mixed = [starts[file] + n for file in files[at : at + FILES_MIXED] for n in range(self.files[file])]
            order += _permuted(mixed, generator)
        return order


def _permuted(numbers: Sequence[int], generator: torch.Generator) -> list[int]:
    return [numbers[place] for place in torch.randperm(len(numbers), generator=generator).tolist()]


@dataclass(frozen=True)
class StepSampler:
    """The micro-batches of one process from a step on, as example numbers: a DataLoader's `batch_sampler`."""

    order: Order
    sharding: Sharding
    first_step: int
    steps: int

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.steps):
            for slot in self.sharding.slots():
                yield [self.order[step * self.sharding.batch + place] for place in slot]

    def __len__(self) -> int:
        return max(0, self.steps - self.first_step) * self.sharding.accumulation


def padded(
    rows: Sequence[Any], fill: int, *, length: int | None = None, dtype: torch.dtype = torch.long, left: bool = True
) -> torch.Tensor:
    """Rows of numbers side by side, filled up on the left, [B, T]; T is that of the longest where no length is given."""
    length = max(map(len, rows)) if length is None else length
    found_BT = torch.full((len(rows), length), fill, dtype=dtype)
    for number, row in enumerate(rows):
        start = length - len(row) if left else 0
        found_BT[number, start : start + len(row)] = torch.as_tensor(row, dtype=dtype)
    return found_BT


def collated(examples: Sequence[Example], pad: int) -> Batch:
    """Examples side by side, padded on the left, as published.

    Returns:
        input_ids, attention_mask, position_ids, targets, [B, T]; `targets` holds for each position the token that it
        predicts, or `IGNORED`.
    """
    longest = max(len(example.ids) for example in examples)
    length = -(-longest // _PAD_TO) * _PAD_TO
    labels = [[IGNORED, *example.labels[1:]] for example in examples]  # nothing stands before the first token
    labels_BT = padded(labels, IGNORED, length=length)
    mask_BT = padded([[1] * len(example.ids) for example in examples], 0, length=length)
    return {
        "input_ids": padded([example.ids for example in examples], pad, length=length),
        "attention_mask": mask_BT,
        "position_ids": (mask_BT.cumsum(dim=1) - 1).clamp(min=0),
        "targets": shifted(labels_BT),
    }


def window_batches(windows: Sequence[Sequence[int]], at_a_time: int) -> Iterator[Batch]:
    """Windows of one length, some at a time; every token but the first is predicted."""
    for start in range(0, len(windows), at_a_time):
        ids_BT = torch.tensor([list(window) for window in windows[start : start + at_a_time]])
        yield {"input_ids": ids_BT, "targets": shifted(ids_BT)}


def shifted(labels_BT: torch.Tensor) -> torch.Tensor:
    """For each position the label of the next one; `IGNORED` at the end."""
    return torch.nn.functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)


@dataclass(frozen=True)
class Examples(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Numbered items; `make` turns some of them into a batch."""

    items: Sequence[Any]
    make: Callable[[Sequence[Any]], Batch]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> Any:
        return self.items[number]


def real_tokens(batch: Batch) -> int:
    """How many tokens of a batch are no padding."""
    mask_BT = batch.get("attention_mask")
    return int(batch["input_ids"].numel() if mask_BT is None else mask_BT.sum())


def predicted_tokens(batch: Batch) -> int:
    """How many tokens of a batch the loss counts."""
    return int((batch["targets"] != IGNORED).sum())
