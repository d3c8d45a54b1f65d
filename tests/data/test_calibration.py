"""Windows of token ids: the published procedure, the default, and what is said when there is too little text."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shortstack.data.calibration import draw_windows
from shortstack.data.chats import Chat, rendered
from shortstack.data.sources import Corpus, read_corpus
from shortstack.errors import ShortstackError
from tests import pico

TOKENIZER = pico.tokenizer()


def corpus(*texts: str) -> Corpus:
    return Corpus("texts", "", documents=list(texts))


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


ROWS = ["".join(random.Random(i).choices("abcdefgh ", k=10 + 7 * i)) for i in range(30)]


def test_published_procedure_from_its_definition() -> None:
    """Draw a row, tokenize with special tokens, reject if short or used, draw a start."""
    generator, used, expected = random.Random(5), set(), []
    while len(expected) < 6:
        index = generator.randint(0, len(ROWS) - 1)
        row = [1, *ids(ROWS[index])]
        if len(row) < 64 or index in used:
            continue
        used.add(index)
        start = generator.randint(0, len(row) - 64)
        expected.append(row[start : start + 64])
    drawn = draw_windows(corpus(*ROWS), TOKENIZER, samples=6, seq_len=64, seed=5, sampling="published")
    assert drawn.windows == expected


def test_published_sampling_ends_where_too_few_rows_are_long_enough() -> None:
    with pytest.raises(ShortstackError, match="needs 10 rows of at least 200 tokens, 3 of 30 rows are") as caught:
        draw_windows(corpus(*ROWS), TOKENIZER, samples=10, seq_len=200, sampling="published")
    assert "--sampling documents" in caught.value.hint


@pytest.mark.parametrize("sampling", ["documents", "published"])
def test_bos_on_every_window(sampling: str) -> None:
    drawn = draw_windows(corpus(*ROWS), TOKENIZER, samples=4, seq_len=32, sampling=sampling, bos_every=True)  # type: ignore[arg-type]
    everything = [ids(row) for row in ROWS]
    for window in drawn.windows:
        assert len(window) == 32
        assert window[0] == 1
        body = window[1:]
        assert any(body == row[k : k + 31] for row in everything for k in range(len(row)))


def test_one_long_document_gives_many_windows() -> None:
    text = "".join(random.Random(0).choices("abcdefgh ", k=3300))
    drawn = draw_windows(corpus(text), TOKENIZER, samples=100, seq_len=32)
    assert len({tuple(window) for window in drawn.windows}) == 100


def test_short_rows_are_joined() -> None:
    drawn = draw_windows(corpus(*["few words"] * 40), TOKENIZER, samples=5, seq_len=64)
    joined = [1, *ids("\n\n".join(["few words"] * 40))]
    assert all(any(window == joined[k : k + 64] for k in range(len(joined))) for window in drawn.windows)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.text("abc de", min_size=0, max_size=60), min_size=1, max_size=12), st.integers(1, 5), st.integers(2, 30)
)
def test_any_texts_give_whole_windows_or_a_clear_error(texts: list[str], samples: int, seq_len: int) -> None:
    try:
        drawn = draw_windows(corpus(*texts), TOKENIZER, samples=samples, seq_len=seq_len)
    except ShortstackError as error:
        assert f"need {samples * seq_len} tokens" in error.message
        return
    assert len(drawn.windows) == samples
    assert all(len(window) == seq_len for window in drawn.windows)
    again = draw_windows(corpus(*texts), TOKENIZER, samples=samples, seq_len=seq_len)
    assert again.windows == drawn.windows


@pytest.mark.fault(91)
def test_the_seed_decides() -> None:
    first, second = (
        draw_windows(corpus(*ROWS), TOKENIZER, samples=4, seq_len=32, seed=seed).windows for seed in (0, 1)
    )
    assert first != second


@pytest.mark.fault(40)
def test_too_little_text_says_how_much() -> None:
    with pytest.raises(ShortstackError, match="10 windows of 128 tokens need 1280 tokens, found 12"):
        draw_windows(corpus("eleven char"), TOKENIZER)


def test_given_windows_are_taken_as_they_stand() -> None:
    rows = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    drawn = draw_windows(Corpus("rows", "", windows=rows), None, samples=2, seq_len=128)
    assert drawn.windows == rows[:2]
    assert drawn.record["seq_len"] == 3
    with pytest.raises(ShortstackError, match="10 windows needed, found 3 rows"):
        draw_windows(Corpus("rows", "", windows=rows), None)
    with pytest.raises(ShortstackError, match="of one length, found lengths .2, 3."):
        draw_windows(Corpus("rows", "", windows=[[1, 2], [1, 2, 3]]), None, samples=2)


def test_chat_rows_go_through_the_template() -> None:
    tokenizer = pico.tokenizer()
    turns = [{"role": "user", "content": "a question " * 8}, {"role": "assistant", "content": "an answer " * 8}]
    chats = [Chat(f"chats, line {number}", turns) for number in (1, 2, 3)]
    with pytest.raises(ShortstackError, match="rows are chats"):
        draw_windows(Corpus("chats", "", chats=chats), tokenizer)
    with pytest.raises(ShortstackError, match="no chat template"):
        draw_windows(Corpus("chats", "", chats=chats), tokenizer, chat_template=True)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    drawn = draw_windows(Corpus("chats", "", chats=chats), tokenizer, samples=2, seq_len=40, chat_template=True)
    text = "<user>" + "a question " * 8 + "<assistant>" + "an answer " * 8
    whole = ids("\n\n".join([text] * 3))
    assert all(any(window == whole[k : k + 40] for k in range(len(whole))) for window in drawn.windows)
    with pytest.raises(ShortstackError, match="no rows of messages"):
        draw_windows(corpus("text"), tokenizer, chat_template=True)


@pytest.mark.fault(99)
def test_a_template_that_refuses_a_chat_names_its_row(tmp_path: Path) -> None:
    """As in training: one reader of chats serves both."""
    tokenizer = pico.tokenizer()
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    row = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]}
    (tmp_path / "c.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ShortstackError, match=r"c\.jsonl, line 1: the chat template refuses these messages: no system"):
        draw_windows(
            read_corpus(str(tmp_path / "c.jsonl"), role="calibration"),
            tokenizer,
            chat_template=True,
            count_prompts=True,
        )


@pytest.mark.fault(99)
def test_chats_are_drawn_from_with_their_parts_joined_and_their_tools(tmp_path: Path) -> None:
    tokenizer = pico.tokenizer()
    tokenizer.chat_template = "{{ tools | tojson }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    parts = [{"type": "text", "text": "an "}, {"type": "text", "text": "answer"}]
    turns = [{"from": "human", "value": "a question"}, {"role": "assistant", "content": parts}]
    (tmp_path / "c.jsonl").write_text(json.dumps({"conversations": turns, "tools": [{"name": "t"}]}) + "\n")
    (chat,) = read_corpus(str(tmp_path / "c.jsonl"), role="calibration").chats
    assert rendered(chat, tokenizer) == '[{"name": "t"}]<user>a question<assistant>an answer'


def test_bos_every_without_bos() -> None:
    tokenizer = pico.tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(ShortstackError, match="no BOS token"):
        draw_windows(corpus(*ROWS), tokenizer, bos_every=True)


@pytest.mark.parametrize(("samples", "seq_len"), [(0, 128), (10, 1)])
def test_numbers_that_make_no_sense(samples: int, seq_len: int) -> None:
    with pytest.raises(ShortstackError, match="expected at least 1 window of at least 2 tokens"):
        draw_windows(corpus(*ROWS), TOKENIZER, samples=samples, seq_len=seq_len)
