"""Rows side by side: padding, the ids of texts that end and of texts that something follows."""

from __future__ import annotations

import torch

from shortstack.data.collators import padded, window_batches
from shortstack.data.tokenizer import end_of_text, open_ids, padding_id
from tests import pico


def test_rows_are_filled_up_on_the_left_or_on_the_right() -> None:
    rows = [[1, 2, 3], (4,)]
    assert padded(rows, 9).tolist() == [[1, 2, 3], [9, 9, 4]]
    assert padded(rows, 9, left=False).tolist() == [[1, 2, 3], [4, 9, 9]]
    assert padded(rows, 0, length=4).tolist() == [[0, 1, 2, 3], [0, 0, 0, 4]]
    assert padded(rows, 0).dtype == torch.long


def test_windows_predict_all_but_their_first_token() -> None:
    first, second = window_batches([[1, 2, 3], [4, 5, 6], [7, 8, 9]], 2)
    assert first["input_ids"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert first["targets"].tolist() == [[2, 3, -100], [5, 6, -100]]
    assert second["input_ids"].tolist() == [[7, 8, 9]]


def test_what_ends_a_text_is_left_out_where_something_follows() -> None:
    tokenizer = pico.tokenizer()
    plain = open_ids(tokenizer, "ab")
    assert plain[0] == tokenizer.bos_token_id
    assert end_of_text(tokenizer) == [2]
    ending = pico.tokenizer(ending=True)
    assert ending("ab")["input_ids"] == [*plain, 2]
    assert open_ids(ending, "ab") == plain


def test_padding_is_a_token_that_the_embedding_has() -> None:
    tokenizer = pico.tokenizer()
    tokenizer.pad_token = "</s>"
    assert padding_id(tokenizer) == 2
    assert padding_id(tokenizer, rows=2) == 0
    tokenizer.pad_token = None
    assert padding_id(tokenizer) == 0
