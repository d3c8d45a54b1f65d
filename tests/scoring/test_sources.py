"""One sweep over named sources gives each source the scores that it has alone, and says which tokens counted."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shortstack.artifacts.scores import CriterionScores, Scores, load_scores
from shortstack.data.calibration import CalibrationSet
from shortstack.errors import ShortstackError, UsageError
from shortstack.families.open_model import open_checkpoint
from shortstack.scoring.criteria import parse_criteria
from shortstack.scoring.score import score, score_windows
from tests import pico
from tests.kills import Warm
from tests.scoring.test_processes import read
from tests.scoring.test_resume import CutOffError, cut_off_after

Built = Callable[..., Path]

EVERY = "ppl,taylor,taylor:batch=2,taylor:p=2,magnitude,bi,update,angular,cluster,kl,accept,ensemble"
PARTS = {
    "general": pico.windows(3, 16, seed=1),
    "code": pico.windows(3, 16, seed=2),
    "sums": pico.windows(3, 16, seed=3),
}


def joined(parts: dict[str, list[list[int]]] = PARTS, counted: list[list[bool]] | None = None) -> CalibrationSet:
    windows = [window for part in parts.values() for window in part]
    return CalibrationSet(windows, {}, tuple(name for name, part in parts.items() for _ in part), counted)


def scored(model: Path, windows: CalibrationSet, criteria: str = EVERY, **options: Any) -> Scores:
    return score_windows(open_checkpoint(model), windows, parse_criteria(criteria), **options)


def assert_same(one: CriterionScores, other: CriterionScores) -> None:
    assert one.scores == pytest.approx(other.scores, rel=1e-5, abs=1e-7)
    assert one.blocks == other.blocks
    assert one.dense_ppl == (other.dense_ppl if other.dense_ppl is None else pytest.approx(other.dense_ppl, rel=1e-6))
    if other.stderr is not None:
        assert one.stderr == pytest.approx(other.stderr, rel=1e-3, abs=1e-7)
    for index, tensors in other.tensors.items():
        assert one.tensors[index] == pytest.approx(tensors, rel=1e-5)


def test_each_source_has_the_scores_that_it_has_alone(built: Built, memory: Any) -> None:
    model = built("llama")
    together = scored(model, joined(), memory=memory)
    for source, windows in PARTS.items():
        alone = scored(model, CalibrationSet(windows, {}), memory=memory)
        for name, one in alone.criteria.items():
            if name == "magnitude":
                assert not together.criteria[name].sources  # the weights are the same for all
            else:
                assert_same(together.criteria[name].sources[source], one)


def test_all_windows_have_the_scores_that_they_have_without_names(built: Built, memory: Any) -> None:
    model = built("llama")
    together, nameless = (
        scored(model, joined(), memory=memory),
        scored(model, CalibrationSet(joined().windows, {}), memory=memory),
    )
    for name, one in nameless.criteria.items():
        if name != "taylor:batch=2":  # no batch holds windows of two sources
            assert_same(together.criteria[name], one)


def test_graphs_that_are_kept_have_the_sources_apart(built: Built) -> None:
    """Gradients alone, the model resident: what autograd keeps of blocks is used in the backward sweep."""
    model = built("llama")
    together = scored(model, joined(), "taylor", memory="resident")
    for source, windows in PARTS.items():
        assert_same(
            together.criteria["taylor"].sources[source],
            scored(model, CalibrationSet(windows, {}), "taylor").criteria["taylor"],
        )


def figures(found: Scores) -> dict[str, Any]:
    return found.to_json()["criteria"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("saves", [2, 7, 9, 14])
def test_resumed_bit_for_bit(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saves: int) -> None:
    model, options = built("llama"), {"save_every": 0.0, "memory": "streamed"}
    criteria = "ppl,taylor,taylor:batch=2,kl"
    expected = figures(scored(model, joined(), criteria))
    with monkeypatch.context() as patched:
        cut_off_after(patched, saves)
        with pytest.raises(CutOffError):
            scored(model, joined(), criteria, work_folder=tmp_path, **options)
    assert figures(scored(model, joined(), criteria, work_folder=tmp_path, **options)) == expected


def texts(folder: Path) -> str:
    """The option that names two sources."""
    for name, word in (("general", "the cat sat "), ("sums", "1 + 2 = 3; ")):
        (folder / f"{name}.txt").write_text(word * 400)
    return f"general={folder / 'general.txt'},sums={folder / 'sums.txt'}"


def test_two_processes(built: Built, warm: Warm, tmp_path: Path) -> None:
    """Three windows each: the second source begins within the share of the first process or the second."""
    model, data = built("llama"), texts(tmp_path)
    command = [
        "score",
        str(model),
        "--data",
        data,
        "--criterion",
        "ppl,taylor,kl,bi",
        "--seq-len",
        "16",
        "--samples",
        "3",
    ]
    log = tmp_path / "log.txt"
    assert warm.run([*command, "--out", str(tmp_path / "two.json")], log, processes=2)["code"] == 0, log.read_text()
    score(str(model), out=tmp_path / "one.json", data=data, criterion="ppl,taylor,kl,bi", seq_len=16, samples=3)
    one, two = load_scores(tmp_path / "one.json"), load_scores(tmp_path / "two.json")
    assert read(tmp_path / "two.json")["settings"]["processes"] == 2
    for name, criterion in one.criteria.items():
        assert_same(two.criteria[name], criterion)
        for source, of in criterion.sources.items():
            assert_same(two.criteria[name].sources[source], of)


def test_files_hold_the_sources_and_old_ones_are_read(built: Built, tmp_path: Path) -> None:
    model, out = built("llama"), tmp_path / "scores.json"
    found = score(str(model), out=out, csv=tmp_path / "csv", data=texts(tmp_path), criterion="ppl,taylor", seq_len=16)
    assert load_scores(out).criteria == found.criteria
    assert found.calibration["samples"] == 10
    assert len(found.calibration["marks"]["hashes"]) == 20
    with (tmp_path / "csv/ppl_n10/sources.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["block"], row["source"]) for row in rows] == [
        (str(block), source) for source in ("general", "sums") for block in range(6)
    ]
    assert float(rows[7]["score"]) == found.criteria["ppl"].sources["sums"].scores[1]
    text = found.to_text()
    assert "the cost of removing a block for each source" in text
    assert all(len(line) <= 80 for line in text.splitlines() if "general" in line and "windows" not in line)
    record = json.loads(out.read_text())
    for entry in record["criteria"].values():
        del entry["sources"]
    (tmp_path / "old.json").write_text(json.dumps(record))
    assert load_scores(tmp_path / "old.json").criteria["ppl"].scores == found.criteria["ppl"].scores


def test_sources_of_other_blocks_are_refused(built: Built, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    score(str(built("llama")), out=out, data=texts(tmp_path), seq_len=16)
    record = json.loads(out.read_text())
    record["criteria"]["ppl"]["sources"]["sums"]["scores"][2] = None
    record["criteria"]["ppl"]["sources"]["sums"]["stderr"][2] = None
    out.write_text(json.dumps(record))
    with pytest.raises(ShortstackError, match="ppl of sums is of other blocks"):
        load_scores(out)


def test_until_takes_one_source(built: Built, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--until stable: supports one source, but --data names several"):
        score(str(built("llama")), data=texts(tmp_path), until="stable", remove=2)


def test_a_journal_of_other_sources_is_not_used(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same windows under other names give other scores of sources."""
    model = built("llama")
    with monkeypatch.context() as patched:
        cut_off_after(patched, 9)
        with pytest.raises(CutOffError):
            scored(model, joined(), "taylor", work_folder=tmp_path, save_every=0.0)
    two = {"general": [*PARTS["general"], *PARTS["code"]], "sums": PARTS["sums"]}
    found = scored(model, joined(two), "taylor", work_folder=tmp_path, save_every=0.0)
    assert figures(found) == figures(scored(model, joined(two), "taylor"))
