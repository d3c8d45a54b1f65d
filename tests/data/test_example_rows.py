"""Rows in flat arrays: the examples and batches of lists, in an eighth of their memory."""

from __future__ import annotations

import json
import pickle
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch

from shortstack.common.progress import Progress
from shortstack.data.collators import Order, Sharding, StepSampler, collated
from shortstack.data.example_rows import Example, ExampleRows, RowsInMaking
from shortstack.data.instructions import IGNORED, labelled_row, split_off
from shortstack.data.loaders import ExampleDataset, in_batches, open_dataset
from shortstack.data.tokenizer import padding_id
from tests import pico
from tests.retraining.material import sentence

CUTOFF = 300


def examples(count: int, seed: int = 0) -> list[Example]:
    generator = random.Random(seed)
    made = []
    for _ in range(count):
        ids = [generator.randrange(32_000) for _ in range(generator.randrange(1, 40))]
        made.append(Example(ids, [token if generator.random() < 0.5 else IGNORED for token in ids]))
    return made


def in_arrays(rows: list[Example]) -> ExampleRows:
    making = RowsInMaking()
    for row in rows:
        making.append(row.ids, row.labels)
    return making.finished()


def test_rows_are_those_that_were_appended() -> None:
    rows = examples(50)
    found = in_arrays(rows)
    assert list(found) == rows
    assert list(found[10:13]) == rows[10:13]
    assert found[-1] == rows[-1]
    assert list(found.chosen([7, 3, 3, 49])) == [rows[7], rows[3], rows[3], rows[49]]
    assert list(found.chosen([7, 3, 3, 49])[1:3]) == [rows[3], rows[3]]
    assert list(pickle.loads(pickle.dumps(found.chosen([5, 2])))) == [rows[5], rows[2]]  # what a worker is sent
    with pytest.raises(IndexError):
        found[50]


@pytest.mark.parametrize("chosen", [range(50), [4, 9, 9, 0], [49]])
def test_counts_are_those_of_the_rows(chosen: Any) -> None:
    rows = examples(50)
    found, expected = in_arrays(rows).chosen(chosen), [rows[number] for number in chosen]
    assert list(found.lengths) == [len(row.ids) for row in expected]
    assert found.predicted == sum(label != IGNORED for row in expected for label in row.labels[1:])
    assert {type(length) for length in found.lengths} == {int}  # of records


@pytest.mark.parametrize("group_by_length", [False, True])
def test_batches_are_to_the_bit_those_of_lists(group_by_length: bool, tmp_path: Path) -> None:
    """Lists of every row, made here, against what a run is given: every batch of two epochs, and of the validation."""
    generator = random.Random(1)
    rows = [
        {"instruction": sentence(generator, 1 + n % 9), "input": "", "output": sentence(generator, 1 + n % 60)}
        for n in range(40)
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    tokenizer = pico.tokenizer()
    dataset = open_dataset(
        str(path), tokenizer, seq_len=CUTOFF, seed=7, validation=6, group_by_length=group_by_length,
        progress=Progress(quiet=True),
    )  # fmt: skip
    assert isinstance(dataset, ExampleDataset)
    cut = [[part[:CUTOFF] for part in labelled_row("", row, tokenizer)] for row in rows]
    assert any(len(ids) == CUTOFF for ids, _ in cut)
    lists = [Example(ids, labels) for ids, labels in cut]
    training, validation = split_off(len(lists), 6, 7)
    pad = padding_id(tokenizer)
    chosen, sharding = [lists[number] for number in training], Sharding(4, 2)
    order = Order([len(one.ids) for one in chosen], 7, group_by_length, 4)
    expected = [collated([chosen[n] for n in numbers], pad) for numbers in StepSampler(order, sharding, 0, 17)]
    expected += in_batches([lists[number] for number in validation], lambda some: collated(some, pad))
    found = [*dataset.loader(sharding, 0, 17, {}, 0), *dataset.validation]
    assert len(found) == len(expected) == 35
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_token_takes_six_bytes_where_lists_take_forty() -> None:
    rows = examples(3000)
    tokens = sum(len(row.ids) for row in rows)

    def taken(make: Any) -> float:
        tracemalloc.start()
        kept = make()
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert kept is not None
        return size / tokens

    # A row's own three numbers count, too: these are short.
    assert taken(lambda: in_arrays(rows)) < 7
    copied = taken(lambda: [(list(map(int, map(str, row.ids))), list(map(int, map(str, row.labels)))) for row in rows])
    assert copied > 40
