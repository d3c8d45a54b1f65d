"""Published texts by name: the hub's rows from local copies in every published form, and texts that a model has met."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shortstack.data.marks import marked_windows, marks_of
from shortstack.data.ppl_datasets import evaluation_texts
from shortstack.errors import ShortstackError, UsageError
from shortstack.evaluation.options import EvaluationOptions
from shortstack.evaluation.ppl import evaluate_ppl
from shortstack.pruning.prune import prune
from shortstack.scoring.score import score
from tests.evaluation.material import lines

Built = Callable[..., Path]
QUIET = EvaluationOptions(quiet=True)


def test_wikitext_rows_are_the_hubs(tmp_path: Path) -> None:
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2/wiki.test.raw").write_bytes(b" \n = Title = \n \n A text . \n")
    (corpus,) = evaluation_texts("wikitext2", tmp_path)
    assert corpus.documents == ["", " = Title = \n", "", " A text . \n"]
    assert (corpus.source, corpus.rows) == ("wikitext2", 4)
    assert corpus.detail == "local copy, wiki.test.raw"


def test_ptb_rows_are_stripped(tmp_path: Path) -> None:
    (tmp_path / "ptb.valid.txt").write_text(" no it was n't \n consumers say \n")
    assert evaluation_texts("ptb", tmp_path)[0].documents == ["no it was n't", "consumers say"]


def test_the_hubs_layout_gives_the_same_rows(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "wikitext-2-raw-v1"
    folder.mkdir()
    rows = [{"text": ""}, {"text": " = Title = \n"}]
    pq.write_table(pa.Table.from_pylist(rows), folder / "test-00000-of-00001.parquet")
    assert evaluation_texts("wikitext2", tmp_path)[0].documents == ["", " = Title = \n"]


def test_of_c4_the_first_documents(tmp_path: Path) -> None:
    (tmp_path / "en").mkdir()
    rows = "".join(json.dumps({"text": f"document {n}", "url": "u"}) + "\n" for n in range(1200))
    for number in range(2):
        (tmp_path / f"en/c4-validation.{number:05d}-of-00008.json.gz").write_bytes(gzip.compress(rows.encode()))
    (corpus,) = evaluation_texts("c4", tmp_path)
    assert (corpus.rows, corpus.documents[-1]) == (1100, "document 1099")
    assert "its first 1100 documents" in corpus.detail


def test_by_name_the_figures_are_those_of_the_official_code(shared: Path, tmp_path: Path) -> None:
    run = json.loads((shared / "golden/golden.json").read_text())["runs"]["stories260k"]
    raw = (shared / "data/text/wikitext2/wiki.test.raw").read_text(encoding="utf-8").split("\n")[:800]
    ptb = (shared / "data/text/ptb/ptb.valid.txt").read_text().split("\n")[:600]
    for name, rows in (("wikitext2/wiki.test.raw", raw), ("ptb/ptb.valid.txt", ptb)):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("\n".join(rows) + "\n", encoding="utf-8")
    found = evaluate_ppl(
        str(shared / run["model"]), data="wikitext2,ptb", data_dir=tmp_path, seq_len="128", options=QUIET
    )
    for result in found.results:
        assert result.figures["ppl_128"].value == pytest.approx(
            run["eval_ppl"]["bos_first"][result.data["source"]], rel=1e-5
        )
        assert result.data["sha256"]


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ShortstackError, match=r"no copy of ptb \(searched for ptb/ptb.valid.txt"):
        evaluation_texts("ptb", tmp_path)
    with pytest.raises(UsageError, match="no such folder"):
        evaluation_texts("ptb", tmp_path / "nowhere")
    (tmp_path / "ptb.valid.txt").write_text("\n\n")
    with pytest.raises(ShortstackError, match="ptb: no usable text"):
        evaluation_texts("ptb", tmp_path)


def test_windows_are_found_again_wherever_they_were_cut() -> None:
    ids = random.Random(0).choices(range(250), k=1000)
    windows = [ids[37:101], ids[500:564], list(range(64))]
    marks = json.loads(json.dumps(marks_of(windows)))
    assert marks["tokens"] == 32
    assert marked_windows(marks, ids) == 2
    assert marked_windows(marks, ids[:200]) == 1
    assert marked_windows(marks, []) == 0
    assert marked_windows(None, ids) == 0
    assert marked_windows({"tokens": "x", "hashes": 3}, ids) == 0


@pytest.mark.fault(45)
@pytest.mark.parametrize("sampling", ["documents", "published"])
def test_calibration_text_inside_the_evaluation_text_is_a_warning(built: Built, tmp_path: Path, sampling: Any) -> None:
    words = [f"word{n * 37 % 1009} and {n}" for n in range(400)]
    rows = [" ".join(words[start : start + 20]) for start in range(0, 400, 20)]
    calibration = lines(tmp_path / "calibration.jsonl", [{"text": row} for row in rows])
    model = str(built("llama"))
    options: dict[str, Any] = {"samples": 3, "seq_len": 64, "sampling": sampling, "quiet": True}
    score(model, data=str(calibration), out=tmp_path / "s.json", **options)
    pruned = prune(model, scores=tmp_path / "s.json", remove=1, plus=False, out=tmp_path / "p", quiet=True)
    (tmp_path / "all.txt").write_text("before " * 40 + " ".join(rows))
    (tmp_path / "other.txt").write_text("something else entirely " * 40)
    met, other = evaluate_ppl(
        str(pruned.out), data=f"{tmp_path / 'all.txt'},{tmp_path / 'other.txt'}", seq_len="32", options=QUIET
    ).results
    assert any("3 of its calibration windows" in note for note in met.notes)
    assert not any("warning" in note for note in other.notes)


def test_text_that_was_trained_on_is_a_warning(copied: Built, tmp_path: Path) -> None:
    model = copied("llama")
    text = tmp_path / "training" / "a.txt"
    text.parent.mkdir()
    text.write_text("some text that was trained on. " * 20)
    record = {
        "schema": 1, "kept_blocks": [0, 1, 2, 3, 4, 5], "original_depth": 6,
        "steps": [{"stage": "retrain", "data": {"source": str(text.parent)}}],
    }  # fmt: skip
    (model / "shortstack.json").write_text(json.dumps(record))
    (result,) = evaluate_ppl(str(model), data=str(text), seq_len="32", options=QUIET).results
    assert any("was trained on this very text" in note for note in result.notes)
