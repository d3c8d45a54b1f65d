"""Rows -> chats: every convention gives the same turns; what is no text is refused by row and turn."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shortstack.data.chats import chat_of, is_chat
from shortstack.errors import ShortstackError

pytestmark = pytest.mark.fault(99)

TURNS = [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."}]
SAME: dict[str, dict[str, Any]] = {
    "messages": {"messages": TURNS},
    "conversations of roles": {"conversations": TURNS},
    "conversations of speakers": {
        "conversations": [{"from": "human", "value": "Name a colour."}, {"from": "gpt", "value": "Blue."}]
    },
    "JSON as text": {"messages": json.dumps(TURNS)},
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Name "}, {"type": "text", "text": "a colour."}]},
            {"role": "assistant", "content": ["Blue."]},
        ]
    },
    "nulls": {"messages": [{**turn, "tool_calls": None, "name": None} for turn in TURNS], "tools": None},
    "no tools": {"messages": TURNS, "tools": []},
    "null beside it": {"messages": None, "conversations": TURNS},
}


@pytest.mark.parametrize("name", list(SAME))
def test_every_convention_gives_the_same_turns(name: str) -> None:
    assert is_chat(SAME[name])
    chat = chat_of("d, line 1", SAME[name])
    assert chat.turns == TURNS
    assert chat.tools is None


def test_prompt_and_completion_are_one_chat() -> None:
    chat = chat_of("d, line 1", {"prompt": TURNS[:1], "completion": TURNS[1:]})
    assert (chat.turns, chat.prompt_turns) == (TURNS, 1)


def test_null_content_beside_a_call_is_empty_text() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"n": None}}}]}
    (turn,) = chat_of("d, line 1", {"messages": [call]}).turns
    assert turn == {**call, "content": ""}


def test_tools_and_a_system_text_of_the_row_are_kept() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    chat = chat_of("d, line 1", {"conversations": TURNS, "tools": json.dumps(tools), "system": "Be brief."})
    assert chat.tools == tools
    assert chat.turns == [{"role": "system", "content": "Be brief."}, *TURNS]


IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "line 1, turn 1: content holds a part of type image_url"),
    ({"messages": [*TURNS, {"role": "user", "content": 5}]}, "line 1, turn 3: content is 5, expected text"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "turn 1: .* of type text without text"),
    ({"messages": [{"content": "x"}]}, r"line 1, turn 1: no role \(found: content\)"),
    ({"messages": ["x"]}, "line 1: messages is not a list of objects"),
    ({"conversations": "x"}, "line 1: conversations is not a list of objects"),
    ({"conversations": [{"from": "narrator", "value": "x"}]}, "line 1, turn 1: from is 'narrator', expected one of"),
    ({"messages": TURNS, "tools": {"name": "f"}}, "line 1: tools is not a list"),
]


@pytest.mark.parametrize(("row", "message"), REFUSED)
def test_what_is_no_chat_of_text_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ShortstackError, match=f"d, {message}" if message.startswith("line") else message) as error:
        chat_of("d, line 1", row)
    assert error.value.hint
