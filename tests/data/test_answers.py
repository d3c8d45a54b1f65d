"""Chats -> labels: the loss lies on the answer's own text, whatever the template does; else the row is refused."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from shortstack.data.answers import IGNORED, labelled_chat
from shortstack.data.chats import Chat
from shortstack.errors import ShortstackError

pytestmark = pytest.mark.fault(99)

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)
TEMPLATES = {
    "chatml": TURNS + PROMPT,
    "begins with BOS": "{{ bos_token }}" + TURNS + PROMPT,
    "opens a thought": TURNS + PROMPT.replace("assistant\n", "assistant\n<think>\n"),
    "empty thought before the last answer": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last and '<think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}" + PROMPT
    ),
    "ends with EOS": TURNS + PROMPT.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}"),
    "ends with EOS, opens a thought": TURNS
    + PROMPT.replace("assistant\n", "assistant\n<think>\n").replace("{% endif %}", "{% else %}</s>{% endif %}"),
    "prompt ends in a space": (
        "{% for m in messages %}{{ '### ' + m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}### assistant: {% endif %}"
    ),
    "trims": TURNS.replace("m.content", "m.content | trim") + PROMPT,
    "alternates": ALTERNATE + TURNS + PROMPT,
}
ASK = {"role": "user", "content": "Name a colour."}
ANSWER = "The colour blue is one of them."
SAY = {"role": "assistant", "content": ANSWER}
OTHER = {"role": "assistant", "content": "<b>red</b>, then"}
ROWS: dict[str, list[dict[str, str]]] = {
    "one": [ASK, SAY],
    "several": [ASK, SAY, ASK, OTHER],
    "the same twice": [ASK, SAY, ASK, SAY],
    "begins with the assistant": [SAY, ASK, OTHER],
    "system": [{"role": "system", "content": "Be brief."}, ASK, SAY],
    "answer as asked": [{"role": "user", "content": ANSWER}, SAY],
    "spaces around": [ASK, {"role": "assistant", "content": f"  {ANSWER}\n"}],
}


@functools.cache
def words() -> Tokenizer:
    """Merges words with the space before them, as real tokenizers do."""
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    text = [f"user: {ANSWER} Name a colour. ### assistant: user: think <b>red</b>, then"] * 4
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    return raw


def tokenizer_with(template: str) -> Any:
    made = PreTrainedTokenizerFast(tokenizer_object=words(), unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    made.chat_template = template
    return made


def answers(tokenizer: Any, turns: list[dict[str, Any]], **fields: Any) -> list[str]:
    """The text under each run of labels."""
    ids, labels = labelled_chat(Chat("d.jsonl, line 1", turns, **fields), tokenizer)
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    runs: list[list[int]] = [[]]
    for label in labels:
        if label != IGNORED:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize("row", list(ROWS))
@pytest.mark.parametrize("name", list(TEMPLATES))
def test_the_loss_lies_on_the_answers_own_text(name: str, row: str) -> None:
    tokenizer, turns = tokenizer_with(TEMPLATES[name]), ROWS[row]
    if name == "alternates" and row in ("begins with the assistant", "system"):
        with pytest.raises(ShortstackError, match="line 1: the chat template refuses these messages: roles must"):
            answers(tokenizer, turns)
        return
    found = answers(tokenizer, turns)
    said = [turn["content"].strip() for turn in turns if turn["role"] == "assistant"]
    ends = "" if name == "prompt ends in a space" else "<|im_end|>"
    empty_thought = "<think>\n\n</think>\n\n" if name.startswith("empty thought") else ""
    shown = [text.removeprefix(empty_thought).removesuffix("</s>").strip() for text in found]
    assert [text.removesuffix(ends).strip() for text in shown] == said
    assert all(text.endswith(ends) for text in shown)


def test_an_end_of_text_is_learned_where_the_chat_ends() -> None:
    found = answers(tokenizer_with(TEMPLATES["ends with EOS"]), [ASK, SAY, ASK, SAY])
    assert found == [f"{ANSWER}<|im_end|>\n", f"{ANSWER}<|im_end|>\n</s>"]


def test_the_first_word_takes_the_prompts_space_with_it() -> None:
    tokenizer = tokenizer_with(TEMPLATES["prompt ends in a space"])
    ids, labels = labelled_chat(Chat("d.jsonl, line 1", [ASK, SAY]), tokenizer)
    first = next(label for label in labels if label != IGNORED)
    assert tokenizer.convert_ids_to_tokens(first) == "ĠThe"
    assert tokenizer.decode(ids) == f"### user: Name a colour.\n### assistant: {ANSWER}\n"


def test_a_thought_that_the_prompt_opens_is_finished() -> None:
    tokenizer = tokenizer_with(TEMPLATES["opens a thought"])
    thought = {"role": "assistant", "content": "<think>\nLet me see.\n</think>\nBlue."}
    assert answers(tokenizer, [ASK, thought]) == ["Let me see.\n</think>\nBlue.<|im_end|>\n"]


FORGETS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}" + PROMPT
)
THOUGHT = {"role": "assistant", "content": "<think>Let me see.</think>Blue."}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "colour", "arguments": {"n": 1}}}]}
TOOLS = [{"type": "function", "function": {"name": "colour"}}]
REFUSED: dict[str, tuple[str, list[dict[str, Any]], str]] = {
    "forgets thoughts of earlier turns": (
        FORGETS,
        [ASK, THOUGHT, ASK, THOUGHT],
        "line 1, turn 2: .* changes this answer",
    ),
    "leaves thoughts out": (
        TURNS.replace("m.content", "m.content.split('</think>')[-1]") + PROMPT,
        [ASK, THOUGHT],
        "line 1, turn 2: the chat template changes this answer",
    ),
    "leaves tool calls out": (TURNS + PROMPT, [ASK, CALL], "line 1, turn 2: .* does not render its tool calls"),
    "renders earlier turns in another way": (
        "{% for m in messages %}{{ messages | length }}{{ m.content }}{% endfor %}",
        [ASK, SAY, ASK, SAY],
        "line 1: the chat template renders earlier turns differently once there are later ones",
    ),
    "renders no answers": (
        "{% for m in messages %}{{ m.role }}{{ m.content if m.role == 'user' }}{% endfor %}",
        [ASK, SAY],
        "line 1, turn 2: .* changes this answer",
    ),
    "leaves a system turn out": (
        "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}</s>{% endfor %}",
        [{"role": "system", "content": "Be brief."}, ASK, SAY],
        "line 1, turn 1: the chat template leaves this turn out .role system.",
    ),
    "has no template": ("", [ASK, SAY], "line 1: messages need a chat template"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_be_told_from_the_rest_is_refused_by_row(case: str) -> None:
    template, turns, message = REFUSED[case]
    with pytest.raises(ShortstackError, match=f"d.jsonl, {message}") as error:
        answers(tokenizer_with(template), turns)
    assert error.value.hint
    assert len(error.value.message.splitlines()) == 1


def test_a_later_thought_is_learned_where_earlier_ones_are_forgotten() -> None:
    assert answers(tokenizer_with(FORGETS), [ASK, SAY, ASK, THOUGHT]) == [
        f"{ANSWER}<|im_end|>\n",
        "<think>Let me see.</think>Blue.<|im_end|>\n",
    ]


def test_tools_are_given_to_the_template_and_calls_are_learned() -> None:
    template = (
        "{% if tools %}Tools: {{ tools | tojson }}\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
        "<|im_end|>\n{% endfor %}" + PROMPT
    )
    tokenizer = tokenizer_with(template)
    turns = [ASK, CALL, {"role": "tool", "content": "blue"}, SAY]
    assert answers(tokenizer, turns, tools=TOOLS) == [
        '<call>{"name": "colour", "arguments": {"n": 1}}</call><|im_end|>\n',
        f"{ANSWER}<|im_end|>\n",
    ]
    ids, _ = labelled_chat(Chat("p", turns, TOOLS), tokenizer)
    assert tokenizer.decode(ids).startswith('Tools: [{"type": "function", "function": {"name": "colour"}}]')


CALLS = (
    "{% for c in m.tool_calls or [] %}{{ '\\n<tool_call>\\n' }}{{ c.function | tojson }}{{ '\\n</tool_call>' }}"
    "{% endfor %}"
)


@pytest.mark.parametrize("content", ["", "Let me look."])
@pytest.mark.parametrize("last", [[], [SAY], [SAY, ASK, SAY]])
def test_calls_are_learned_where_the_last_turn_begins_with_an_empty_thought(content: str, last: list[Any]) -> None:
    template = TEMPLATES["empty thought before the last answer"].replace("{{ m.content }}", "{{ m.content }}" + CALLS)
    two = [*CALL["tool_calls"], {"function": {"name": "shade", "arguments": {}}}]
    turns = [ASK, {**CALL, "content": content, "tool_calls": two}, {"role": "tool", "content": "blue"}, *last]
    called = (
        f'{content}\n<tool_call>\n{{"name": "colour", "arguments": {{"n": 1}}}}\n</tool_call>'
        '\n<tool_call>\n{"name": "shade", "arguments": {}}\n</tool_call><|im_end|>\n'
    )
    said = [f"{ANSWER}<|im_end|>\n" for turn in last if turn is SAY]
    if said:
        said[-1] = "<think>\n\n</think>\n\n" + said[-1]
    assert answers(tokenizer_with(template), turns, tools=TOOLS) == [called, *said]


def test_answers_of_a_prompt_are_not_learned() -> None:
    tokenizer = tokenizer_with(TEMPLATES["chatml"])
    assert answers(tokenizer, [ASK, OTHER, ASK, SAY], prompt_turns=3) == [f"{ANSWER}<|im_end|>\n"]


@pytest.mark.parametrize("turns", [[], [ASK], [ASK, {"role": "assistant", "content": " "}]])
def test_without_an_answer_there_are_no_labels(turns: list[dict[str, Any]]) -> None:
    assert answers(tokenizer_with(TEMPLATES["chatml"]), turns) == []
