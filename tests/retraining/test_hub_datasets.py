"""Published sets by name and others by id, from a server on the loopback: only what is read is fetched."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.test_hub import shortstack
from tests.hub_server import serving
from tests.retraining import material

pq = pytest.importorskip("pyarrow.parquet")
pa = pytest.importorskip("pyarrow")


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str]]]:
    """The published sets in their published layout, small."""
    folder = tmp_path_factory.mktemp("sets")
    lines = [json.loads(line) for line in material.texts(folder / "t.jsonl", rows=30).read_text().splitlines()]
    for split in ("train", "test", "validation"):
        parquet(folder / f"wikitext/wikitext-2-raw-v1/{split}-00000-of-00001.parquet", lines)
        parquet(folder / f"wikitext/wikitext-103-raw-v1/{split}-00000-of-00001.parquet", lines)
        parquet(folder / f"ptb/penn_treebank/{split}/0000.parquet", [{"sentence": row["text"]} for row in lines])
    parquet(folder / "books/plain_text/train/0000.parquet", lines)
    parquet(folder / "books/plain_text/train/0001.parquet", lines)
    (folder / "c4/en").mkdir(parents=True)
    for number in range(4):
        data = gzip.compress("".join(json.dumps(row) + "\n" for row in lines).encode())
        (folder / f"c4/en/c4-train.{number:05d}-of-01024.json.gz").write_bytes(data)
        (folder / f"c4/en/c4-validation.{number:05d}-of-00008.json.gz").write_bytes(data)
    (folder / "alpaca").mkdir()
    material.instructions(folder / "alpaca/alpaca_data_cleaned.json")
    (folder / "mine/data").mkdir(parents=True)
    (folder / "mine/README.md").write_text("mine")
    material.texts(folder / "mine/data/train.jsonl")
    material.texts(folder / "mine/data/test.jsonl", seed=2)
    names = {
        "Salesforce/wikitext": "wikitext", "ptb-text-only/ptb_text_only": "ptb", "bookcorpus/bookcorpus": "books",
        "allenai/c4": "c4", "yahma/alpaca-cleaned": "alpaca", "org/mine": "mine",
    }  # fmt: skip
    with serving({f"datasets/{name}": folder / short for name, short in names.items()}) as (endpoint, requests):
        yield endpoint, requests


def files_of(requests: list[str]) -> set[str]:
    """What was fetched, as names in the set; a revision may hold slashes, too."""
    found = {request.partition("/resolve/")[2] for request in requests if request.startswith("GET datasets/")}
    return {
        name.removeprefix("refs/convert/parquet/").removeprefix("main/").removeprefix("a" * 40 + "/") for name in found
    }


# source -> what is fetched to train on it
FETCHED = {
    "wikitext2": {"wikitext-2-raw-v1/train-00000-of-00001.parquet"},
    "ptb": {"penn_treebank/train/0000.parquet"},
    "bookcorpus": {"plain_text/train/0000.parquet", "plain_text/train/0001.parquet"},
    "alpaca-cleaned": {"alpaca_data_cleaned.json"},
    "org/mine": {"data/train.jsonl"},
}


@pytest.mark.parametrize("source", sorted(FETCHED))
def test_a_set_is_trained_on_by_name(source: str, hub: tuple[str, list[str]], pruned: Path, tmp_path: Path) -> None:
    endpoint, requests = hub
    requests.clear()
    rows = source == "alpaca-cleaned"
    way = ["lora", "--cutoff", "400"] if rows else ["cpt", "--seq-len", "32", "--tokens", "12K"]
    done = shortstack(
        endpoint, tmp_path / "home", "retrain", way[0], str(pruned), "--data", source, "--out", str(tmp_path / "out"),
        "--batch", "4", "--max-steps", "2", "--validation", "4", "--quiet", *way[1:],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    fetched = files_of(requests)
    assert fetched <= FETCHED[source], fetched
    assert fetched
    record = json.loads((tmp_path / "out/shortstack.json").read_text())["steps"][-1]
    assert record["data"]["source"] == source


def test_a_stream_fetches_what_it_reads(hub: tuple[str, list[str]], pruned: Path, tmp_path: Path) -> None:
    """Of C4's files the first one is enough here; validation text comes from its own."""
    endpoint, requests = hub
    requests.clear()
    common = ["--out", str(tmp_path / "out"), "--batch", "4", "--seq-len", "32", "--validation", "0", "--quiet"]
    done = shortstack(
        endpoint, tmp_path / "home", "retrain", "cpt", str(pruned), "--data", "c4", "--eval-data", "wikitext2",
        "--max-steps", "2", *common,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    fetched = files_of(requests)
    assert fetched == {"en/c4-train.00000-of-01024.json.gz", "wikitext-2-raw-v1/test-00000-of-00001.parquet"}


def test_the_published_split_is_evaluated_by_name(hub: tuple[str, list[str]], pruned: Path, tmp_path: Path) -> None:
    endpoint, requests = hub
    requests.clear()
    done = shortstack(
        endpoint, tmp_path / "home", "eval", "ppl", str(pruned), "--data", "wikitext2,ptb", "--seq-len", "64", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert files_of(requests) == {
        "wikitext-2-raw-v1/test-00000-of-00001.parquet", "penn_treebank/validation/0000.parquet"
    }  # fmt: skip
    first, second = (record["data"] for record in json.loads(done.stdout))
    assert (first["source"], second["source"]) == ("wikitext2", "ptb")
    assert first["rows"] == second["rows"] == 30
    assert first["detail"].startswith("hub, test-00000")


@pytest.mark.parametrize(
    ("source", "says"),
    [("org/nothing", "org/nothing"), ("nowhere", "give a file, a folder, a hub id, or one of embedded")],
)
def test_no_such_set(source: str, says: str, hub: tuple[str, list[str]], pruned: Path, tmp_path: Path) -> None:
    done = shortstack(
        hub[0], tmp_path / "home", "retrain", "cpt", str(pruned), "--data", source, "--out", str(tmp_path / "out")
    )
    assert done.returncode != 0
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 3
