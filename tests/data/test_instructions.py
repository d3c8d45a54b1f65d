"""Rows -> examples: templates, masks, cutoffs, and errors that name the row."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shortstack.common.progress import Progress
from shortstack.data.instructions import IGNORED, kind_of, read_instructions, split_off
from shortstack.data.loaders import ExampleDataset, open_dataset
from shortstack.errors import ShortstackError
from tests import pico

CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return pico.tokenizer()


def written(path: Path, rows: list[Any]) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows) if path.suffix == ".jsonl" else json.dumps(rows)
    path.write_text(text)
    return str(path)


def trained_text(tokenizer: Any, example: Any) -> str:
    return str(tokenizer.decode([token for token in example.labels if token != IGNORED]))


def test_the_response_alone_is_trained_on(tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {"instruction": "Say it.", "input": "", "output": "it"},
        {"instruction": "Say it.", "input": "with this", "output": "this"},
        {"instruction": "No input at all", "output": "none"},
    ]
    found = read_instructions(written(tmp_path / "d.json", rows), tokenizer, cutoff=1000)
    assert [trained_text(tokenizer, example) for example in found.examples] == ["it</s>", "this</s>", "none</s>"]
    whole = [tokenizer.decode(example.ids) for example in found.examples]
    assert all(text.startswith("<s>Below is an instruction") for text in whole)
    assert whole[0].endswith("### Instruction:\nSay it.\n\n### Response:\nit</s>")
    assert whole[1].endswith("### Input:\nwith this\n\n### Response:\nthis</s>")
    assert "### Input" not in whole[2]
    assert found.truncated == 0


def test_a_long_row_is_cut_and_does_not_end(tokenizer: Any, tmp_path: Path) -> None:
    """The end of text is what a model learns to stop with: it is not put where the answer goes on."""
    rows = [{"instruction": "a", "output": "b" * 300}, {"instruction": "a" * 400, "output": "b"}]
    found = read_instructions(written(tmp_path / "d.jsonl", rows), tokenizer, cutoff=256)
    assert len(found.examples) == 1
    assert found.truncated == 2
    assert found.empty == 1
    assert len(found.examples[0].ids) == 256
    assert set(trained_text(tokenizer, found.examples[0])) == {"b"}
    said = found.to_text()
    assert "2 rows" in said
    assert "100.0% of the rows truncated" in said
    assert "1 rows skipped" in said


def test_shares_are_of_what_is_trained_on(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"instruction": "a", "output": "bcd"}]
    found = read_instructions(written(tmp_path / "d.json", rows), tokenizer, cutoff=1000)
    masked = 1 - 4 / len(found.examples[0].ids)
    assert f"{masked:.1%} of the tokens masked" in found.to_text()


def test_without_a_token_of_a_response_nothing_is_trained(tokenizer: Any, tmp_path: Path) -> None:
    data = written(tmp_path / "d.json", [{"instruction": "a" * 300, "output": "b"}] * 2)
    with pytest.raises(ShortstackError, match="none of its 2 rows has a token of its response within the cutoff of 64"):
        read_instructions(data, tokenizer, cutoff=64)


def test_chats_are_trained_on_what_the_assistant_says(tmp_path: Path) -> None:
    tokenizer = pico.tokenizer()
    tokenizer.chat_template = CHAT
    turns = [("user", "hi"), ("assistant", "hello"), ("user", "more"), ("assistant", "enough")]
    messages = [{"role": role, "content": content} for role, content in turns]
    found = read_instructions(written(tmp_path / "d.jsonl", [{"messages": messages}]), tokenizer, cutoff=1000)
    assert trained_text(tokenizer, found.examples[0]) == "hello</s>enough</s>"
    assert tokenizer.decode(found.examples[0].ids).startswith("<s>user: hi</s><s>assistant: hello</s>")


BROKEN = [
    (
        [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": 3}],
        "line 2: output is 3, expected a string",
    ),
    ([{"instruction": "a", "output": "b"}, {"instruction": "a"}], "line 2: output is None"),
    ([{"instruction": "a", "output": "b"}, {"text": "t"}], "line 2: a row of text among rows of instructions"),
    ([{"instruction": "a", "output": "b"}, {"query": "t"}], r"line 2: expected .* \(found: query\)"),
    ([{"instruction": "a", "output": "b"}, ["t"]], "line 2: expected an object, found list"),
    ([{"messages": [{"role": "user", "content": "a"}]}], "line 1: messages need a chat template"),
    ([{"messages": "hi"}], "line 1: messages is not a list"),
    ([{"instruction": "a", "output": "b", "input": ["c"]}], r"line 1: input is \['c'\], expected a string"),
    ([{"question": "a", "answer": {"text": "b"}}], "line 1: answer is {'text': 'b'}, expected a string"),
    ([{"prompt": "a", "chosen": "b", "rejected": "c"}], "line 1: expected .* pairs of answers"),
    ([{"prompt": ["a"], "completion": "b"}], r"line 1: prompt is \['a'\], expected a string"),
]


@pytest.mark.parametrize(("rows", "says"), BROKEN)
def test_a_broken_row_is_named(rows: list[Any], says: str, tokenizer: Any, tmp_path: Path) -> None:
    data = written(tmp_path / "d.jsonl", rows)
    with pytest.raises(ShortstackError, match=rf"d\.jsonl, {says}") as error:
        read_instructions(data, tokenizer, cutoff=100)
    assert len(error.value.message.splitlines()) == 1


ALPACA = {"instruction": "Name one.", "input": "of these", "output": "blue"}
CONVENTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "alpaca": (ALPACA, ""),
    "dolly": (
        {"instruction": "Name one.", "context": "of these", "response": "blue", "category": "qa"},
        "read: instruction (as instruction), context (as input), response (as output); not used: category",
    ),
    "question and answer": (
        {"question": "Name one.", "input": "of these", "answer": "blue"},
        "read: question (as instruction), input (as input), answer (as output)",
    ),
    "prompt and response": (
        {"prompt": "Name one.", "input": "of these", "response": "blue", "system_prompt": "Be brief."},
        "read: prompt (as instruction), input (as input), response (as output); not used: system_prompt",
    ),
}


@pytest.mark.fault(99)
@pytest.mark.parametrize("name", list(CONVENTIONS))
def test_other_names_of_the_fields_mean_the_same(name: str, tokenizer: Any, tmp_path: Path) -> None:
    row, form = CONVENTIONS[name]
    expected = read_instructions(written(tmp_path / "a.jsonl", [ALPACA]), tokenizer, cutoff=1000)
    data = written(tmp_path / "d.jsonl", [row])
    found = read_instructions(data, tokenizer, cutoff=1000)
    assert kind_of(data) == "instructions"
    assert list(found.examples) == list(expected.examples)
    assert found.form == form
    assert form in found.to_text()


@pytest.mark.fault(99)
def test_prompt_and_completion_are_joined_as_they_stand(tokenizer: Any, tmp_path: Path) -> None:
    data = written(tmp_path / "d.jsonl", [{"prompt": "Say it: ", "completion": "it"}])
    found = read_instructions(data, tokenizer, cutoff=1000)
    assert tokenizer.decode(found.examples[0].ids) == "<s>Say it: it</s>"
    assert trained_text(tokenizer, found.examples[0]) == "it</s>"
    assert "prompt and completion joined unchanged" in found.to_text()


@pytest.mark.fault(99)
def test_rows_without_an_answer_are_counted_and_reported(tmp_path: Path) -> None:
    tokenizer = pico.tokenizer()
    tokenizer.chat_template = CHAT
    asked = {"role": "user", "content": "hi"}
    rows = [
        {"instruction": "a", "output": "b"},
        {"instruction": "a", "output": ""},
        {"instruction": "a", "output": " \n"},
        {"messages": [asked]},
        {"messages": []},
        {"messages": [asked, {"role": "assistant", "content": None}]},
    ]
    found = read_instructions(written(tmp_path / "d.jsonl", rows), tokenizer, cutoff=1000)
    assert [trained_text(tokenizer, example) for example in found.examples] == ["b</s>"]
    assert (found.rows, found.unanswered, found.empty) == (6, 5, 0)
    assert "5 rows skipped: their answer is empty or missing" in found.to_text()
    with pytest.raises(ShortstackError, match="none of its 5 rows has an answer"):
        read_instructions(written(tmp_path / "e.jsonl", rows[1:]), tokenizer, cutoff=1000)


@pytest.mark.fault(99)
def test_tools_that_a_template_does_not_show_are_reported(tmp_path: Path) -> None:
    tokenizer = pico.tokenizer()
    tokenizer.chat_template = CHAT
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    data = written(tmp_path / "d.jsonl", [{"messages": turns, "tools": [{"name": "t"}], "id": 1}])
    assert "read as chats: messages; not used: tools, id" in read_instructions(data, tokenizer, cutoff=1000).to_text()
    tokenizer.chat_template = "{{ tools | tojson }}" + CHAT
    assert "not used: id" in read_instructions(data, tokenizer, cutoff=1000).to_text()


@pytest.mark.fault(39, 100)
def test_a_token_beyond_the_embedding_is_refused_by_row(tmp_path: Path) -> None:
    tokenizer = pico.tokenizer()
    rows = pico.VOCABULARY
    tokenizer.add_tokens(["<mine>", "<yours>"])
    data = written(
        tmp_path / "d.jsonl", [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": "<yours>"}]
    )
    read_instructions(data, tokenizer, cutoff=1000)
    with pytest.raises(ShortstackError, match=rf"d\.jsonl, line 2: <yours> is token 260, .* {rows} rows") as error:
        read_instructions(data, tokenizer, cutoff=1000, embedding_rows=rows)
    assert "resize the embedding" in error.value.hint


@pytest.mark.fault(100)
def test_a_padding_token_beyond_the_embedding_is_never_looked_up(tmp_path: Path) -> None:
    tokenizer = pico.tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    rows = [{"instruction": "a", "output": "b" * n} for n in range(1, 9)]
    dataset = open_dataset(
        written(tmp_path / "d.jsonl", rows), tokenizer, seq_len=400, seed=1, validation=2, isolated=True,
        group_by_length=False, progress=Progress(quiet=True), embedding_rows=tokenizer.pad_token_id,
    )  # fmt: skip
    assert isinstance(dataset, ExampleDataset)
    assert (
        max(int(batch["input_ids"].max()) for batch in [*dataset.validation, dataset.make(dataset.items)])
        < tokenizer.pad_token_id
    )


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path) -> None:
    tokenizer = pico.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ messages | length }}{{ m['content'] }}{% endfor %}"
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]
    with pytest.raises(ShortstackError, match="line 1: the chat template renders earlier turns differently"):
        read_instructions(written(tmp_path / "d.jsonl", [{"messages": turns}]), tokenizer, cutoff=100)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".jsonl.gz", ".parquet"])
def test_every_form_of_file_gives_the_same_examples(suffix: str, tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"instruction": f"say {n}", "input": "", "output": str(n)} for n in range(5)]
    path = tmp_path / f"d{suffix}"
    if suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        table = pytest.importorskip("pyarrow").Table.from_pylist(rows)
        parquet.write_table(table, path)
    elif suffix == ".jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    else:
        written(path, rows)
    expected = read_instructions(written(tmp_path / "e.json", rows), tokenizer, cutoff=500)
    found = read_instructions(str(path), tokenizer, cutoff=500)
    assert kind_of(str(path)) == "instructions"
    assert list(found.examples) == list(expected.examples)
    assert found.sha256 == expected.sha256


def test_what_a_source_holds_is_seen(tmp_path: Path) -> None:
    assert kind_of("embedded") == "text"
    assert kind_of(written(tmp_path / "t.jsonl", [{"text": "x"}])) == "text"
    assert kind_of(written(tmp_path / "c.jsonl", [{"messages": []}])) == "instructions"
    (tmp_path / "t.txt").write_text("instruction")
    assert kind_of(str(tmp_path / "t.txt")) == "text"
    with pytest.raises(ShortstackError, match="no rows"):
        kind_of(written(tmp_path / "n.json", []))


# Taken once from datasets 5.2.0: train_test_split(validation, shuffle=True, seed=42).
SPLITS = {
    (24, 2): ([18, 19, 9, 7], [16, 15]),
    (2000, 200): ([1389, 1203, 1167, 1897], [1631, 285, 1268, 747]),
    (51760, 2000): ([2122, 28688, 6323, 6910], [43475, 17807, 2684, 20139]),
}


@pytest.mark.parametrize(("count", "validation_rows"), list(SPLITS))
def test_the_split_is_the_published_one(count: int, validation_rows: int) -> None:
    training, validation = split_off(count, validation_rows, 42)
    assert sorted(training + validation) == list(range(count))
    assert len(validation) == validation_rows
    assert (training[:4], validation[:4]) == SPLITS[count, validation_rows]


def test_what_is_held_out_is_not_trained_on(built: Callable[..., Path], tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"instruction": "number", "output": f"{n:03d}"} for n in range(40)]
    dataset = open_dataset(
        written(tmp_path / "d.json", rows), tokenizer, seq_len=400, seed=42, validation=None, isolated=True,
        group_by_length=False, progress=Progress(quiet=True),
    )  # fmt: skip
    assert isinstance(dataset, ExampleDataset)
    training = {trained_text(tokenizer, example) for example in dataset.items}
    validation = set()
    for batch in dataset.validation:
        for targets in batch["targets"].tolist():
            validation.add(tokenizer.decode([token for token in targets if token != IGNORED]))
    assert len(training) == 36
    assert len(validation) == 4
    assert not training & validation


def test_nothing_left_to_train_on(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ShortstackError, match="3 of 3 rows are for validation"):
        split_off(3, 3, 0)
