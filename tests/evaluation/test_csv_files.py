"""The published layout of evaluations: what a program for the published tables reads, from results by hand and from a run."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shortstack.artifacts.csv_folder import check_csv_folder, file_name, model_folders
from shortstack.artifacts.results import Figure, Result
from shortstack.errors import UsageError
from shortstack.evaluation.csv_files import write_published_csv
from shortstack.evaluation.ppl import evaluate_ppl
from shortstack.evaluation.samples import evaluate_samples

LENGTHS = [128, 2048]


def rows_of(path: Path) -> list[list[str]]:
    return list(csv.reader(path.read_text().splitlines()))


def result(model: str, what: str, source: str = "", **fields: Any) -> Result:
    given: dict[str, Any] = {
        "data": {"source": source, "sha256": "", "rows": 1}, "settings": {"dtype": "bfloat16"}, "figures": {}, "per_item": {},
    }  # fmt: skip
    return Result(
        model=model, fingerprint="f", what=what, parameters=3 << 20, nbytes=0, seconds=0, peak_rss_bytes=0,
        peak_device_bytes=None, notes=[], **{**given, **fields},
    )  # fmt: skip


def ppl(model: str, source: str, values: dict[str, float | None]) -> Result:
    figures = {name: Figure(value, None, "ppl", 1, "" if value else "too long") for name, value in values.items()}
    return result(
        model, "ppl", source, figures=figures, settings={"dtype": "bfloat16", "seq_len": LENGTHS, "device": "cpu"}
    )


def test_perplexities_have_a_table_for_each_rule_and_length(tmp_path: Path) -> None:
    first = {"ppl_128": 20.5, "ppl_128_bos_every": 19.25, "ppl_2048": 6.0, "ppl_2048_bos_every": None}
    second = {"ppl_128": 1 / 3, "ppl_128_bos_every": 4.0, "ppl_2048": 5.0, "ppl_2048_bos_every": None}
    results = [
        ppl("org/dense", "wikitext2", first), ppl("org/dense", "ptb", second), ppl("./pruned/", "wikitext2", second)
    ]  # fmt: skip
    write_published_csv(results, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "pruned"}
    header = ["ppl_wikitext2", "ppl_ptb", "params", "mem"]
    last = [str(3 << 20), "6.0"]
    assert rows_of(tmp_path / "dense/ppl.csv") == [header, ["20.5", repr(1 / 3), *last]]
    assert rows_of(tmp_path / "dense/ppl_bos.csv") == [header, ["19.25", "4.0", *last]]
    assert rows_of(tmp_path / "dense/ppl_2048.csv") == [header, ["6.0", "5.0", *last]]
    assert rows_of(tmp_path / "dense/ppl_2048_bos.csv") == [header, ["", "", *last]]
    assert rows_of(tmp_path / "pruned/ppl.csv") == [["ppl_wikitext2", "params", "mem"], [repr(1 / 3), *last]]


def test_samples_are_a_text(tmp_path: Path) -> None:
    settings = {"dtype": "float32", "prompt": "The Leaning", "new_tokens": 7, "prompt_tokens": 3}
    write_published_csv(
        [result("m", "samples", settings=settings, per_item={"texts": ["The Leaning\ntower", "b"]})], tmp_path
    )
    assert (tmp_path / "m/gen_text.txt").read_text() == (
        "=== input ===\nThe Leaning\n"
        "=== output 0 | leng gen 7 + input 3\nThe Leaning\ntower\n=== output 1 | leng gen 7 + input 3\nb\n"
    )


def test_tables_of_a_run(built: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "some text.txt").write_text("words of a text that is long enough for windows. " * 20)
    model, data = str(built("llama")), str(tmp_path / "some text.txt")
    (found,) = evaluate_ppl(model, data=data, seq_len="32", bos="both", csv=tmp_path / "csv", quiet=True).results
    folder = tmp_path / "csv" / Path(model).name
    assert sorted(path.name for path in folder.iterdir()) == ["ppl_32.csv", "ppl_32_bos.csv"]
    header, row = rows_of(folder / "ppl_32.csv")
    assert header == ["ppl_some_text.txt", "params", "mem"]
    assert (float(row[0]), int(row[1])) == (found.figures["ppl_32"].value, found.parameters)
    assert float(row[2]) == found.parameters * 4 / (1 << 20)
    assert float(rows_of(folder / "ppl_32_bos.csv")[1][0]) == found.figures["ppl_32_bos_every"].value
    evaluate_ppl(model, data=data, seq_len="16", csv=tmp_path / "csv", quiet=True)
    assert {path.name for path in folder.glob("ppl_16*")} == {"ppl_16.csv"}, "the other rule was not measured"
    (written,) = evaluate_samples(
        model, prompt="ab", count=2, new_tokens=3, csv=tmp_path / "csv", quiet=True, fresh=True
    ).results
    text = (folder / "gen_text.txt").read_text()
    assert text.count("leng gen 3 + input 3") == 2, "the tokenizer puts BOS in front of the two letters"
    assert all(one in text for one in written.per_item["texts"])


def test_names_are_safe_and_each_models_own() -> None:
    names = model_folders(["a/model", "b/model", "../..", "org/=x", "model-2"])
    assert list(names.values()) == ["model", "model-2", "model-3", "_x", "model-2-2"]
    assert file_name("=1+1") == "_1_1"


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    check_csv_folder(None)
    check_csv_folder(tmp_path / "new/folder")
    (tmp_path / "odd.csv").mkdir()
    check_csv_folder(tmp_path / "odd.csv")
    with pytest.raises(UsageError, match="table.csv: expected a folder"):
        check_csv_folder(tmp_path / "table.csv")
