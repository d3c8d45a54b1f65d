"""Chats -> token ids with the loss on the answers' own text, found in what the template renders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from shortstack.data.chats import Chat, need_template, rendered
from shortstack.errors import ShortstackError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of a token that is not predicted, as torch's cross entropy has it
_MARK = "AnswerMark0x7f3a"


def labelled_chat(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """(token ids, labels) of a chat: labels are the ids of what the assistant says, its end of turn included.

    Raises:
        ShortstackError: the template refuses the chat, or renders an answer so that it cannot be told from the rest.
    """
    answers = [n for n, turn in enumerate(chat.turns) if n >= chat.prompt_turns and _is_answer(turn)]
    if not answers:
        need_template(chat, tokenizer)
        return [], []
    rendering = _Rendering(chat, tokenizer)
    rendering.check_prompts()
    spans = [rendering.span(number) for number in answers]
    return labelled(
        rendering.text, spans, lambda text: list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    )


def labelled(
    text: str, spans: Sequence[tuple[int, str]], encode: Callable[[str], list[int]]
) -> tuple[list[int], list[int]]:
    """(token ids, labels) of a text that is tokenized as a whole, as a model sees it.

    Args:
        text: the whole.
        spans: of each answer, the character where it starts, and the text up to its end. What that has beyond the end
            (an end of text, where the whole has a next turn) is ignored.
        encode: text -> ids.

    Returns:
        The ids, and labels where a token holds a character of an answer; a token that begins before it (a space that the
        first word takes with it) is predicted, too.
    """
    ids = encode(text)
    labels = [IGNORED] * len(ids)
    for start, until in spans:
        first = shared_length(ids, encode(text[:start]))
        ending = encode(until)
        last = shared_length(ids, ending)
        last += last < len(ending) and text.startswith(until)  # one token holds the end and what follows it
        labels[first:last] = ids[first:last]
    return ids, labels


def shared_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many tokens (or characters) two texts have in common at their beginning."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _is_answer(turn: dict[str, Any]) -> bool:
    return turn["role"] == "assistant" and bool(turn["content"].strip() or turn.get("tool_calls"))


def _squeezed(text: str) -> str:
    return "".join(text.split())


@dataclass(frozen=True)
class _Rendering:
    """A chat's text, and where its answers lie in it."""

    chat: Chat
    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def text(self) -> str:
        """The whole chat."""
        return rendered(self.chat, self.tokenizer)

    def check_prompts(self) -> None:
        """Refuse a template that leaves a turn out: the answer would be learned without what it answers."""
        whole = _squeezed(self.text)
        for number, turn in enumerate(self.chat.turns, start=1):
            if turn["role"] in ("system", "user") and _squeezed(turn["content"]) not in whole:
                raise ShortstackError(
                    f"{self.chat.place}, turn {number}: the chat template leaves this turn out (role {turn['role']})",
                    hint="remove the turn, or use a model whose template renders it",
                )

    def span(self, number: int) -> tuple[int, str]:
        """(first character, text up to the end) of what turn `number` adds behind a generation prompt.

        A template whose prompt goes further than its answers do (it opens a thought), or that renders an answer in another
        way when it is the last one, shows the place by a mark in the answer's stead.
        """
        turns = self.chat.turns
        before, after = self._first(turns[:number], prompt=True), self._first(turns[: number + 1])
        if before and not self.text.startswith(before):
            self._check_context(before, self._first(turns[:number]))
        self._check_calls(number, self.text)
        start = len(before) if before and self.text.startswith(before) else None
        end = shared_length(self.text, after)
        if start is None or not self._holds_answer(number, start, end):
            marked_start, marked_until = self._marked(number)
            start = marked_start if start is None else start
            end = shared_length(self.text, after)
            after = after if self._holds_answer(number, start, end) else marked_until
            end = shared_length(self.text, after)
        self._check_calls(number, self.text[start:end])
        return start, after

    def _first(self, turns: Sequence[dict[str, Any]], *, prompt: bool = False) -> str:
        """Some first turns as text; empty where there is none or the template takes no such chat."""
        try:
            return rendered(self.chat, self.tokenizer, turns, prompt=prompt) if turns else ""
        except ShortstackError:
            return ""

    def _check_context(self, before: str, earlier: str) -> None:
        """Refuse other earlier turns than an answer is generated after."""
        if shared_length(before, self.text) < shared_length(before, earlier):
            raise ShortstackError(
                f"{self.chat.place}: the chat template renders earlier turns differently once there are later ones",
                hint="keep one answer per row",
            )

    def _holds_answer(self, number: int, start: int, end: int) -> bool:
        """Whether the answer lies before `end`; a prompt may hold its beginning, such as the opening of a thought."""
        content = self.chat.turns[number]["content"]
        return (
            end >= start
            and _squeezed(content) in _squeezed(self.text[max(0, start - len(content)) : end])
            and self._holds_calls(number, self.text[start:end])
        )

    def _holds_calls(self, number: int, answer: str) -> bool:
        """Whether a turn's calls of tools are in the text, by their names."""
        for call in self.chat.turns[number].get("tool_calls") or []:
            function = call.get("function", call) if isinstance(call, dict) else {}
            name = function.get("name") if isinstance(function, dict) else None
            if not isinstance(name, str) or name not in answer:
                return False
        return True

    def _marked(self, number: int) -> tuple[int, str]:
        """Start of an answer's content and the text up to the end of its turn, by a mark in the content's place.

        Raises:
            ShortstackError: the template changes the answer, so the loss would be on other text.
        """
        turns = [*self.chat.turns]
        content = turns[number]["content"]
        turns[number] = {**turns[number], "content": _MARK}
        before, _, behind = rendered(replace(self.chat, turns=turns), self.tokenizer).partition(_MARK)
        _, mark, ending = self._first(turns[: number + 1]).partition(_MARK)
        end = len(self.text) - len(behind)
        found = self.text[len(before) : end] if self.text.startswith(before) and self.text.endswith(behind) else None
        if found is None or _squeezed(found) != _squeezed(content) or not mark:
            raise ShortstackError(
                f"{self.chat.place}, turn {number + 1}: the chat template changes this answer, or does so once there "
                "are later turns",
                hint="keep one answer per row, without what the template leaves out (such as thoughts)",
            )
        return len(before), self.text[:end] + ending

    def _check_calls(self, number: int, answer: str) -> None:
        """Refuse a template that leaves out the calls of tools: the loss would lie on an empty answer."""
        if not self._holds_calls(number, answer):
            raise ShortstackError(
                f"{self.chat.place}, turn {number + 1}: the chat template does not render its tool calls",
                hint="remove the row, or use a model whose template has tools",
            )
