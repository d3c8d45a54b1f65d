"""What a column writes: the same seed gives the same text, whatever else runs; it stops; limits hold on the server."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shortstack.demo.options import RANGES, Limits
from shortstack.demo.writing import Asked, Column, Writing
from shortstack.errors import ShortstackError, UsageError
from shortstack.evaluation.options import EvaluationOptions
from shortstack.pruning.prune import prune

Built = Callable[..., Path]
OPTIONS = EvaluationOptions(quiet=True)


def column(directory: Path) -> Column:
    return Column("it", str(directory), OPTIONS)


def last(asked: Asked, of: Column, stop: threading.Event | None = None) -> Writing:
    return list(of.write(asked, stop or threading.Event()))[-1]


def test_the_same_seed_gives_the_same_texts_and_the_process_draws_as_before(built: Built) -> None:
    one, asked = column(built("llama")), Asked("a word", new_tokens=32, batch=3, seed=4)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = last(asked, one)
    assert bool((torch.random.get_rng_state() == state).all()), "a page draws from the process's own numbers"
    found: list[Writing] = []
    threads = [threading.Thread(target=lambda: found.append(last(asked, column(built("llama"))))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [writing.texts for writing in found] == [first.texts] * 2
    assert len(set(first.texts)) > 1, "the texts of a batch differ"
    assert last(Asked("a word", new_tokens=32, batch=3, seed=5), one).texts != first.texts
    assert first.tokens <= 96
    assert first.first is not None and first.first <= first.seconds  # noqa: PT018
    assert first.peak_bytes


def test_greedy_does_not_depend_on_the_seed(built: Built) -> None:
    one = column(built("llama"))
    texts = [last(Asked("a word", new_tokens=32, seed=seed, temperature=0), one).texts for seed in (1, 2)]
    assert texts[0] == texts[1]


def test_stop_stops_and_what_is_abandoned_ends(built: Built) -> None:
    one, stop = column(built("llama")), threading.Event()
    stop.set()
    stopped = last(Asked("a", new_tokens=60), one, stop)
    assert stopped.stopped
    assert stopped.tokens <= 2
    writing = one.write(Asked("a", new_tokens=60), threading.Event())
    next(writing)
    writing.close()  # the visitor left
    assert not one.lock.locked()
    assert not [thread for thread in threading.enumerate() if thread.name == "generation"]


@pytest.mark.fault(81)
def test_what_a_page_sends_is_brought_into_range() -> None:
    limits = Limits(characters=10)
    asked = Asked.within(
        limits, "hello", new_tokens=10**6, batch=-3, seed=float("inf"), top_k="x", top_p=float("nan"), temperature=-1.0
    )
    assert (asked.new_tokens, asked.batch, asked.seed) == (256, 1, 2**31 - 1)
    assert (asked.top_k, asked.top_p, asked.temperature) == (RANGES["top_k"][2], RANGES["top_p"][2], 0.0)
    for prompt, said in (("x" * 11, "11 characters; 10 are allowed"), (" \n", "empty"), (None, "empty")):
        with pytest.raises(UsageError, match=said):
            Asked.within(limits, prompt)


def test_what_does_not_fit_into_the_positions_is_an_error_in_words(built: Built) -> None:
    with pytest.raises(UsageError, match="positions"):
        last(Asked("a" * 40, new_tokens=64), column(built("llama")))


def test_a_column_that_cannot_be_opened_says_why_and_writes_nothing(tmp_path: Path) -> None:
    broken = column(tmp_path / "nowhere")
    assert "no such directory" in broken.error
    assert (broken.blocks, broken.facts, broken.is_loaded) == ((), "", False)
    with pytest.raises(ShortstackError, match="no such directory"):
        last(Asked("a"), broken)


def test_a_checkpoint_that_vanishes_while_the_page_is_open_is_an_error_in_words(copied: Built) -> None:
    directory = copied("llama")
    one = column(directory)
    (directory / "model.safetensors").unlink()
    with pytest.raises(ShortstackError, match="safetensors"):
        last(Asked("a"), one)


def test_a_column_tells_its_blocks(built: Built, tmp_path: Path) -> None:
    prune(str(built("llama")), blocks="1,3", out=tmp_path / "cut", quiet=True)
    short = column(tmp_path / "cut")
    assert (short.blocks, short.original_depth) == ((0, 2, 4, 5), 6)
    assert "llama · 4 blocks · " in short.facts
