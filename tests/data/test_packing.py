"""Text -> windows: nothing lost, nothing twice, the same for any number of processes and workers, from any step on."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shortstack.common.progress import Progress
from shortstack.data import packing as packing_module
from shortstack.data.collators import Sharding
from shortstack.data.instructions import IGNORED
from shortstack.data.loaders import StreamDataset, open_dataset
from shortstack.data.packing import Encoder, PackedStream, Packing
from shortstack.data.text_stream import cut_text, open_texts
from shortstack.errors import ShortstackError, UsageError
from tests import pico
from tests.retraining import material

LENGTH = 32


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return pico.tokenizer()


def packing_of(source: Path | str, tokenizer: Any, **changed: Any) -> Packing:
    chosen: dict[str, Any] = {"seq_len": LENGTH, "seed": 3, **changed}
    return Packing(open_texts(str(source)), Encoder(tokenizer), **chosen)


def numbered(path: Path, rows: int, words: int = 20) -> Path:
    """Documents that say which they are in every word."""
    lines = [json.dumps({"text": " ".join(f"d{n}w{w}" for w in range(words))}) for n in range(rows)]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def batches(stream: PackedStream, count: int) -> list[dict[str, Any]]:
    reader: Iterator[Any] = iter(stream)
    return [next(reader) for _ in range(count)]


def windows(packing: Packing, sharding: Sharding, steps: int, state: dict[str, Any] | None = None) -> torch.Tensor:
    """[steps, rows of this process, T]."""
    found = batches(PackedStream(packing, sharding, state), steps * sharding.accumulation)
    return torch.cat([batch["input_ids"] for batch in found]).reshape(steps, -1, LENGTH)


def test_a_global_batch_does_not_depend_on_how_it_is_shared(tokenizer: Any, tmp_path: Path) -> None:
    packing = packing_of(numbered(tmp_path / "t.jsonl", 50), tokenizer)
    whole = windows(packing, Sharding(8, 8), 6)
    for micro, world in ((2, 1), (4, 2), (1, 4), (2, 4)):
        parts = [windows(packing, Sharding(8, micro, rank, world), 6) for rank in range(world)]
        assert torch.equal(torch.cat(parts, dim=1), whole), (micro, world)


@pytest.mark.parametrize("workers", [1, 2])
def test_nor_on_the_number_of_workers(workers: int, tokenizer: Any, tmp_path: Path) -> None:
    dataset = StreamDataset(packing_of(numbered(tmp_path / "t.jsonl", 50), tokenizer), [], {}, None)
    sharding = Sharding(8, 2)
    expected = windows(dataset.packing, sharding, 3).reshape(-1, 2, LENGTH)
    found = iter(dataset.loader(sharding, 0, 3, {}, workers))
    assert all(torch.equal(next(found)["input_ids"], batch) for batch in expected)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stop=st.integers(0, 30), rows=st.integers(3, 40), seed=st.integers(0, 3))
def test_goes_on_from_any_step(stop: int, rows: int, seed: int, tokenizer: Any, tmp_path: Path) -> None:
    """At the middle of a piece, of a group, of an epoch, and where an epoch begins again."""
    packing = packing_of(numbered(tmp_path / "t.jsonl", rows), tokenizer, seed=seed)
    sharding = Sharding(4, 2)
    whole = batches(PackedStream(packing, sharding), 2 * stop + 12)
    state: dict[str, Any] = {}
    for batch in whole[: 2 * stop]:
        state |= batch["stream"]
    state = json.loads(json.dumps(state))  # as it is saved
    rest = batches(PackedStream(packing, sharding, state), 12)
    for ours, expected in zip(rest, whole[2 * stop :], strict=True):
        assert torch.equal(ours["input_ids"], expected["input_ids"])
        assert torch.equal(ours["targets"], expected["targets"])


def test_goes_on_across_groups(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing_module, "_GROUP", 16)
    test_goes_on_from_any_step.hypothesis.inner_test(21, 60, 1, tokenizer, tmp_path)  # type: ignore[attr-defined]


def test_an_epoch_holds_every_token_once(tokenizer: Any, tmp_path: Path) -> None:
    source = numbered(tmp_path / "t.jsonl", 64, words=30)
    packing = packing_of(source, tokenizer)
    tokens = packing.count_tokens()
    assert tokens is not None
    expected = Counter(
        token
        for line in source.read_text().splitlines()
        for token in Encoder(tokenizer)(json.loads(line)["text"], True)
    )
    assert tokens == sum(expected.values())
    found: Counter[int] = Counter()
    ids = [
        int(t)
        for batch in batches(PackedStream(packing, Sharding(1, 1)), tokens // LENGTH)
        for t in batch["input_ids"].flatten()
    ]
    found.update(ids)
    # One stream strings everything together: what is left of the epoch is less than a window.
    missing = expected - found
    assert not found - expected
    assert sum(missing.values()) == tokens - len(ids) < LENGTH


def test_epochs_are_shuffled_anew(tokenizer: Any, tmp_path: Path) -> None:
    packing = packing_of(numbered(tmp_path / "t.jsonl", 40), tokenizer)
    tokens = packing.count_tokens() or 0
    text = tokenizer.decode(windows(packing, Sharding(1, 1), 2 * tokens // LENGTH + 2).flatten().tolist())
    order = [part.split("w")[0] for part in text.split("<s>d")[1:]]
    first, second = order[:40], order[40:80]
    assert sorted(first) == sorted(second)
    assert first != second
    assert first != sorted(first, key=int)


def test_what_is_held_out_is_never_trained_on(tokenizer: Any, tmp_path: Path) -> None:
    packing, chosen = packing_of(numbered(tmp_path / "t.jsonl", 200, words=30), tokenizer).holding_out(12)

    def documents(ids: torch.Tensor) -> set[str]:
        """Documents whose tenth word stands in these windows."""
        return set(re.findall(r"(d\d+)w9 ", tokenizer.decode(ids.flatten().tolist())))

    validation = torch.stack([window["input_ids"] for window in chosen])
    streams = windows(packing, Sharding(4, 4), 400).unbind(dim=1)
    trained = set.union(*map(documents, streams))
    assert len(validation) == 12
    assert documents(validation)
    assert len(trained) == 200 - 2  # more than an epoch; two documents make twelve windows
    assert not documents(validation) & trained


def test_short_documents_make_as_many_windows_for_validation(tokenizer: Any, tmp_path: Path) -> None:
    source = numbered(tmp_path / "t.jsonl", 400, words=2)
    assert [len(packing_of(source, tokenizer).holding_out(asked)[1]) for asked in (0, 3, 6, 100)] == [0, 3, 6, 9]


def test_a_document_is_not_predicted_from_the_one_before(tokenizer: Any, tmp_path: Path) -> None:
    packing = packing_of(numbered(tmp_path / "t.jsonl", 30, words=2), tokenizer)
    crossings = 0
    for batch in batches(PackedStream(packing, Sharding(4, 4)), 6):
        for ids, targets, positions in zip(batch["input_ids"], batch["targets"], batch["position_ids"], strict=True):
            starts = (ids == 1).nonzero().flatten().tolist()
            crossings += len([start for start in starts if start])
            for place in range(LENGTH - 1):
                crosses = place + 1 in starts
                assert targets[place] == (IGNORED if crosses else ids[place + 1])
                assert positions[place + 1] == (0 if crosses else positions[place] + 1)
            assert targets[-1] == IGNORED
    assert crossings > 20
    together = packing_of(tmp_path / "t.jsonl", tokenizer, isolated=False)
    for batch in batches(PackedStream(together, Sharding(4, 4)), 2):
        assert torch.equal(batch["position_ids"], torch.arange(LENGTH).expand(4, -1))


def test_long_documents_are_cut_where_words_end(tokenizer: Any, tmp_path: Path) -> None:
    text = material.sentence(random.Random(0), 4000)
    pieces = cut_text(text, 400)
    assert "".join(pieces) == text
    assert all(piece.startswith(" ") for piece in pieces[1:])
    assert max(map(len, pieces)) <= 600
    assert cut_text("x" * 1000, 400) == ["x" * 400, "x" * 600]
    # An end of text stands once for each document, however many pieces it has.
    (tmp_path / "long.txt").write_text(text)
    packing = packing_of(tmp_path / "long.txt", tokenizer)
    tokens = packing.count_tokens() or 0
    ids = [t for _, piece, ends in packing.source.pieces(packing.characters) for t in packing.encode(piece, ends)]
    assert tokens == len(ids)
    assert ids.count(2) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".parquet", "/"])
def test_every_form_of_file_gives_the_same_windows(suffix: str, tokenizer: Any, tmp_path: Path) -> None:
    plain = numbered(tmp_path / "plain.jsonl", 30)
    rows = [json.loads(line) for line in plain.read_text().splitlines()]
    path = tmp_path / f"other{suffix}"
    if suffix == ".parquet":
        pytest.importorskip("pyarrow.parquet").write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), path)
    elif suffix == ".jsonl.gz":
        path.write_bytes(gzip.compress(plain.read_bytes()))
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    elif suffix == "/":
        path.mkdir()
        (path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:11]))
        (path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[11:]))
    else:
        path.write_bytes(plain.read_bytes())
    sharding = Sharding(4, 2)
    expected = windows(packing_of(plain, tokenizer), sharding, 8)
    packing = packing_of(path, tokenizer)
    assert torch.equal(windows(packing, sharding, 8), expected)
    state: dict[str, Any] = {}
    for batch in batches(PackedStream(packing, sharding), 10):
        state |= batch["stream"]
    assert torch.equal(windows(packing, sharding, 3, state), expected[5:])


def test_a_row_without_text_is_named(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "fine"}\n{"title": "no text"}\n')
    with pytest.raises(ShortstackError, match=r"t\.jsonl, line 2: no text \(found: title\)"):
        packing_of(path, tokenizer).count_tokens()


def test_text_that_is_all_blank_ends_with_an_error_not_a_loop(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "  "}\n' * 3)
    with pytest.raises(ShortstackError, match="no usable text"):
        windows(packing_of(path, tokenizer), Sharding(1, 1), 1)


PLACES = [
    ("t.jsonl", '{"text": "fine"}\n\n{"text": "a <mine> b"}\n', r"t\.jsonl, line 3"),
    ("t.jsonl", '{"text": "fine"}\n{"text": "' + "long " * 300 + '<mine>"}\n', r"t\.jsonl, line 2"),
    ("t.json", '[{"text": "fine"}, {"text": "a <mine> b"}]', r"t\.json, row 2"),
    ("t.txt", "fine <mine>", r"t\.txt, at its end"),
    ("t.txt", "<mine> " + "long " * 300, r"t\.txt, before byte \d+"),
]


@pytest.mark.fault(39, 100)
@pytest.mark.parametrize(("name", "content", "place"), PLACES)
def test_a_token_beyond_the_embedding_is_refused_before_a_step(
    name: str, content: str, place: str, tmp_path: Path
) -> None:
    tokenizer = pico.tokenizer()
    tokenizer.add_tokens(["<there is a row for this one>", "<mine>"])
    (tmp_path / name).write_text(content)
    opened = {
        "seq_len": LENGTH, "seed": 0, "validation": 0, "isolated": True, "group_by_length": False,
        "progress": Progress(quiet=True),
    }  # fmt: skip
    message = f"{place}: <mine> is token 260, but the embedding has 260 rows"
    with pytest.raises(ShortstackError, match=message):
        open_dataset(str(tmp_path / name), tokenizer, embedding_rows=pico.VOCABULARY, **opened)
    packing = Packing(open_texts(str(tmp_path / name)), Encoder(tokenizer, pico.VOCABULARY), LENGTH, 0)
    with pytest.raises(ShortstackError, match=message):  # of a source that is too large to be read beforehand
        windows(packing, Sharding(1, 1), 50)
    open_dataset(str(tmp_path / name), tokenizer, **opened)


@pytest.mark.fault(100)
def test_tokens_beyond_the_embedding_are_reported_where_text_is_not_read_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(packing_module, "_COUNTED", 100)
    tokenizer = pico.tokenizer()
    tokenizer.add_tokens(["<there is a row for this one>", "<mine>"])
    open_dataset(
        str(numbered(tmp_path / "t.jsonl", 30)), tokenizer, seq_len=LENGTH, seed=0, validation=0, isolated=True,
        group_by_length=False, progress=Progress(), embedding_rows=pico.VOCABULARY,
    )  # fmt: skip
    assert "no row for 1 tokens of the tokenizer, such as <mine>" in capsys.readouterr().err


@pytest.mark.fault(41)
def test_blank_text_is_called_so(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "", "content": "x"}\n')
    with pytest.raises(ShortstackError, match="no usable text"):
        open_dataset(
            str(tmp_path / "t.jsonl"), tokenizer, seq_len=LENGTH, seed=0, validation=None, isolated=True,
            group_by_length=False, progress=Progress(quiet=True),
        )  # fmt: skip


def test_epochs_of_what_is_too_large_to_count(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing_module, "_COUNTED", 100)
    dataset = open_dataset(
        str(numbered(tmp_path / "t.jsonl", 30)), tokenizer, seq_len=LENGTH, seed=0, validation=0, isolated=True,
        group_by_length=False, progress=Progress(quiet=True),
    )  # fmt: skip
    with pytest.raises(UsageError, match="too large to count"):
        dataset.steps(4, epochs=1, tokens=None)
    assert dataset.steps(4, epochs=None, tokens=1000) == 8  # 1000 / 128, rounded up


def test_batches_that_cannot_be_shared_are_refused() -> None:
    with pytest.raises(UsageError, match="--batch 6 is not a multiple of 2") as error:
        Sharding(6, 2, 0, 2)
    assert "--batch 8" in error.value.hint


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_row_in_a_worker_is_the_same_two_lines(
    workers: int, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing_module, "_COUNTED", 100)  # as a text that is too large to be read beforehand
    path = numbered(tmp_path / "t.jsonl", 30)
    with path.open("a") as stream:
        stream.write('{"text": 5}\n')
    dataset = open_dataset(str(path), tokenizer, seq_len=LENGTH, validation=0, progress=Progress(quiet=True))
    with pytest.raises(ShortstackError) as error:
        list(dataset.loader(Sharding(1, 1), 0, 100, {}, workers))
    assert error.value.message == f"{path}, line 31: text is 5, expected a string"
    assert error.value.hint == "correct or remove the row"
