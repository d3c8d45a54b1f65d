"""Rows that are chats: turns of text in one form, whatever convention a row follows, and rendered by a template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shortstack.errors import ShortstackError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT_FIELDS = ("messages", "conversations", "conversation")
# Who speaks, where turns have `from` and `value` (ShareGPT) -> the role of a chat template.
_ROLES = {
    "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bing": "assistant", "model": "assistant",
    "system": "system",
    "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip
_TEXT_PARTS = ("text", "input_text", "output_text")


@dataclass(frozen=True)
class Chat:
    """One chat, its turns in the form that chat templates take.

    Attributes:
        place: file and row, for errors.
        turns: each with `role`, `content` (text, empty where there was none) and what else the row holds of it.
        tools: descriptions of tools for the template, or None.
        prompt_turns: how many turns are the prompt of a row of `prompt` and `completion`.
    """

    place: str
    turns: list[dict[str, Any]]
    tools: list[Any] | None = None
    prompt_turns: int = 0


def is_chat(row: Mapping[str, Any]) -> bool:
    """Whether a row holds a chat: messages, conversations, or prompt and completion as lists of messages."""
    if any(row.get(name) is not None for name in CHAT_FIELDS):
        return True
    return isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list)


def chat_of(place: str, row: Mapping[str, Any]) -> Chat:
    """A row's chat.

    Args:
        place: file and row, for errors.
        row: for which `is_chat` holds.

    Raises:
        ShortstackError: it holds something other than turns of text.
    """
    name = next((name for name in CHAT_FIELDS if row.get(name) is not None), None)
    prompt = [] if name else _turns(place, "prompt", row["prompt"])
    turns = _turns(place, name or "completion", row[name or "completion"])
    if isinstance(row.get("system"), str) and row["system"] and [turn["role"] for turn in turns][:1] != ["system"]:
        turns = [{"role": "system", "content": row["system"]}, *turns]
    tools = _decoded(row.get("tools")) or None  # an empty text or list is none
    if tools is not None and not isinstance(tools, list):
        raise ShortstackError(f"{place}: tools is not a list", hint="correct the row")
    return Chat(place, [*prompt, *turns], tools or None, len(prompt))


def rendered(
    chat: Chat, tokenizer: PreTrainedTokenizerBase, turns: Sequence[Any] | None = None, *, prompt: bool = False
) -> str:
    """The text that the tokenizer's template makes of a chat.

    Args:
        chat: whose place errors name and whose tools the template is given.
        tokenizer: has the template.
        turns: these instead of the chat's own.
        prompt: end with what comes before an answer.

    Raises:
        ShortstackError: there is no template, or it refuses the turns.
    """
    turns = chat.turns if turns is None else turns
    need_template(chat, tokenizer)
    if not turns:
        raise ShortstackError(f"{chat.place}: a chat without a turn", hint="remove the row")
    try:
        text = tokenizer.apply_chat_template(
            list(turns), tools=chat.tools, tokenize=False, add_generation_prompt=prompt
        )
    except Exception as error:  # templates raise what they like
        raise ShortstackError(
            f"{chat.place}: the chat template refuses these messages: {first_line(error)}",
            hint="change or remove the row, or use a model whose template takes it",
        ) from None
    return str(text)


def need_template(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that has no template for chats."""
    if not getattr(tokenizer, "chat_template", None):
        raise ShortstackError(
            f"{chat.place}: messages need a chat template, and the tokenizer has none",
            hint="give rows of text or of instruction and output, or a model with a chat template",
        )


def _turns(place: str, name: str, value: Any) -> list[dict[str, Any]]:
    turns = _decoded(value)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ShortstackError(f"{place}: {name} is not a list of objects", hint="correct the row")
    return [_turn(f"{place}, turn {number}", turn) for number, turn in enumerate(turns, start=1)]


def _turn(place: str, turn: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in turn.items() if value is not None}
    content = kept.get("content")
    if "role" not in kept and "from" in kept:
        speaker, content = kept.pop("from"), kept.pop("value", None)
        if speaker not in _ROLES:
            raise ShortstackError(
                f"{place}: from is {speaker!r:.40}, expected one of {', '.join(_ROLES)}", hint="correct the row"
            )
        kept["role"] = _ROLES[speaker]
    if not isinstance(kept.get("role"), str):
        found = ", ".join(map(str, turn)) or "nothing"
        raise ShortstackError(f"{place}: no role (found: {found})", hint="a turn has role and content")
    return {**kept, "content": _text(place, content)}


def _text(place: str, content: Any) -> str:
    """Content as text: parts of text are joined; null is the empty text, as beside a tool call."""
    if isinstance(content, str) or content is None:
        return content or ""
    if not isinstance(content, list):
        raise ShortstackError(f"{place}: content is {content!r:.40}, expected text", hint="correct the row")
    parts = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in content]
    for part in parts:
        kind = part.get("type", "text" if "text" in part else None)
        if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            found = kind if kind not in _TEXT_PARTS else f"{kind} without text"
            raise ShortstackError(
                f"{place}: content holds a part of type {found}, expected only text", hint="remove the row"
            )
    return "".join(part["text"] for part in parts)


def _decoded(value: Any) -> Any:
    """A list that was stored as JSON text, as tables without nested columns have it."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
