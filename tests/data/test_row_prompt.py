"""Templates by name and from files, rows without one as published, and what the loss counts, decoded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shortstack.data.example_rows import Example
from shortstack.data.instructions import IGNORED, read_instructions
from shortstack.data.row_prompt import ALPACA, PromptOptions, read_template
from shortstack.errors import ShortstackError, UsageError
from tests import pico

ROWS = [
    {"instruction": "Say it.", "input": "", "output": "it"},
    {"instruction": "Say that", "input": "twice", "output": "that that"},
]
OWN = {"prompt_input": "Q: {instruction} ({input}) {{x}}\nA: ", "prompt_no_input": "Q: {instruction}\nA: "}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return pico.tokenizer()


def file(path: Path, content: Any) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def read(tokenizer: Any, folder: Path, rows: list[Any] = ROWS, cutoff: int = 1000, **options: Any) -> list[Example]:
    data = file(folder / "rows.json", rows)
    return list(read_instructions(data, tokenizer, cutoff=cutoff, prompt=PromptOptions(**options).read()).examples)


def texts(tokenizer: Any, examples: list[Example]) -> list[tuple[str, str]]:
    """(all of an example, what the loss counts of it) as text."""
    return [
        (tokenizer.decode(one.ids), tokenizer.decode([label for label in one.labels if label != IGNORED]))
        for one in examples
    ]


def test_a_template_from_a_file(tokenizer: Any, tmp_path: Path) -> None:
    own = file(tmp_path / "own.json", {**OWN, "description": "mine", "response_split": "A:"})
    assert texts(tokenizer, read(tokenizer, tmp_path, prompt_template=own)) == [
        ("<s>Q: Say it.\nA: it</s>", "it</s>"),
        ("<s>Q: Say that (twice) {x}\nA: that that</s>", "that that</s>"),
    ]


def test_the_published_template_is_the_default(tokenizer: Any, tmp_path: Path) -> None:
    named, unnamed = read(tokenizer, tmp_path, prompt_template="alpaca"), read(tokenizer, tmp_path)
    assert named == unnamed
    assert tokenizer.decode(unnamed[1].ids).startswith("<s>Below is an instruction")


def test_without_a_template_rows_read_as_published(tokenizer: Any, tmp_path: Path) -> None:
    rows = [*ROWS, {"instruction": "Which?", "input": "this one!", "output": "that"}]
    assert texts(tokenizer, read(tokenizer, tmp_path, rows, instruction=False)) == [
        ("<s>Say it:  it</s>", " it</s>"),
        ("<s>Say that: twice. that that</s>", " that that</s>"),
        ("<s>Which? this one! that</s>", " that</s>"),
    ]


def test_prompts_are_trained_on_too(tokenizer: Any, tmp_path: Path) -> None:
    for one in read(tokenizer, tmp_path, train_on_inputs=True):
        assert one.labels == one.ids
    long = [{"instruction": "a" * 400, "output": "b"}, {"instruction": "a", "output": ""}]
    (cut,) = read(tokenizer, tmp_path, long, cutoff=256, train_on_inputs=True)
    assert cut.labels == cut.ids, "a prompt that fills the cutoff is trained on"


def test_no_end_of_text(tokenizer: Any, tmp_path: Path) -> None:
    assert [counted for _, counted in texts(tokenizer, read(tokenizer, tmp_path, add_eos=False))] == ["it", "that that"]


def test_chats_are_trained_on_whole(tokenizer: Any, tmp_path: Path) -> None:
    chatty = pico.tokenizer()
    chatty.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant: {% endif %}"
    )
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}]
    (one,) = read(chatty, tmp_path, rows, train_on_inputs=True)
    assert one.labels == one.ids
    for idle in ({"instruction": False}, {"add_eos": False}, {"prompt_template": file(tmp_path / "own.json", OWN)}):
        with pytest.raises(UsageError, match="no effect on .*rows.json: it holds chats"):
            read(chatty, tmp_path, rows, **idle)


def test_rows_that_are_joined_take_no_template(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "1 + 1 = ", "completion": "2"}]
    assert texts(tokenizer, read(tokenizer, tmp_path, rows, add_eos=False)) == [("<s>1 + 1 = 2", "2")]
    with pytest.raises(
        UsageError, match="--no-instruction: no effect on .*rows.json: it holds prompts and completions"
    ):
        read(tokenizer, tmp_path, rows, instruction=False)


BROKEN = [
    ("no json", "the template cannot be read"),
    ("[" * 100_000, "the template cannot be read"),
    (["a"], "not a prompt template"),
    ({"prompt_input": "{instruction} {input}"}, "not a prompt template"),
    ({**OWN, "promt": ""}, "'promt' is not a key"),
    ({**OWN, "prompt_input": 3}, "prompt_input is 3, expected a string"),
    (
        {**OWN, "prompt_input": "{instruction}"},
        r"prompt_input holds \{instruction\} in braces, expected .* and \{input\}",
    ),
    ({**OWN, "prompt_no_input": "{instruction} {input}"}, "prompt_no_input holds"),
    ({**OWN, "prompt_no_input": "{instruction.__class__}"}, r"prompt_no_input holds \{instruction.__class__\}"),
    ({**OWN, "prompt_no_input": "{instruction!r}"}, "prompt_no_input holds"),
    ({**OWN, "prompt_no_input": "{instruction:>9}"}, "prompt_no_input holds"),
    ({**OWN, "prompt_no_input": "{instruction} {"}, "prompt_no_input: "),
    ({**OWN, "prompt_no_input": "none"}, r"prompt_no_input holds nothing in braces, expected \{instruction\}"),
]


@pytest.mark.fault(130)
@pytest.mark.parametrize(("content", "says"), BROKEN)
def test_a_broken_template_is_refused(content: Any, says: str, tmp_path: Path) -> None:
    path = file(tmp_path / "own.json", content)
    with pytest.raises(ShortstackError, match=rf"own\.json: {says}") as error:
        read_template(path)
    assert len(error.value.message.splitlines()) == 1
    assert error.value.hint


def test_a_template_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--prompt-template alpac: neither the name of a template nor a file") as error:
        PromptOptions(prompt_template="alpac").read()
    assert "alpaca" in error.value.hint
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ShortstackError, match=r"bytes\.json: the template cannot be read"):
        read_template(str(tmp_path / "bytes.json"))
    with pytest.raises(UsageError, match="one requires a template, the other none"):
        PromptOptions(prompt_template="own.json", instruction=False)
    assert read_template("alpaca") is ALPACA
