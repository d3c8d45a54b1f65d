"""How far rankings agree."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shortstack.artifacts.scores import CriterionScores, Scores
from shortstack.cli.app import run
from shortstack.errors import ShortstackError
from shortstack.scoring.agreement import agree, kendall_tau
from shortstack.scoring.score import score
from tests.retraining.material import texts

Built = Callable[..., Path]


def order(path: Path, text: str) -> Path:
    path.write_text(text + "\n")
    return path


def test_tau_by_hand() -> None:
    assert kendall_tau([0, 1, 2, 3], [0, 1, 2, 3]) == 1
    assert kendall_tau([0, 1, 2, 3], [3, 2, 1, 0]) == -1
    # Of the six pairs, (0, 1) and (2, 3) are turned round.
    assert kendall_tau([0, 1, 2, 3], [1, 0, 3, 2]) == pytest.approx(2 / 6)


@settings(deadline=None)  # the first example imports scipy
@given(st.permutations(range(9)), st.permutations(range(9)))
def test_tau_is_scipys(one: list[int], other: list[int]) -> None:
    def rank(order: list[int]) -> list[int]:
        return [order.index(block) for block in range(9)]

    stats = pytest.importorskip("scipy.stats")
    assert kendall_tau(one, other) == pytest.approx(stats.kendalltau(rank(one), rank(other)).statistic)


def test_the_sets_that_would_go(tmp_path: Path) -> None:
    a = order(tmp_path / "a.csv", "0,5,4,6,7,8,9,10,1,2,3,11")
    b = order(tmp_path / "b.csv", "11,6,5,7,4,8,9,10,1,2,3,0")
    (pair,) = agree(a, b, remove=2).pairs
    assert pair.chosen == {2: ((5,), (4,), (6,))}  # 0-3 and 10-11 are protected
    assert pair.by_chance == {2: pytest.approx(4 / 6)}
    (bare,) = agree(a, b, remove=2, plus=False).pairs
    assert bare.chosen == {2: ((), (0, 5), (6, 11))}


def test_protected_blocks_are_those_of_the_model_not_of_what_was_scored(tmp_path: Path) -> None:
    """`score --blocks 2-9` of a model of 12 blocks: 4-9 are removable, the first four and last two of the model are not."""
    scored = tuple(range(2, 10))
    files = []
    for name, values in (("a", range(8)), ("b", range(8, 0, -1))):
        ppl = CriterionScores("ppl", tuple(map(float, values)), scored)
        Scores("model", "f", tuple(range(12)), {"ppl": ppl}).save(tmp_path / f"{name}.json")
        files.append(tmp_path / f"{name}.json")
    found = agree(*files, remove=2)
    assert found.protected == (0, 1, 2, 3, 10, 11)
    assert found.pairs[0].chosen == {2: ((), (4, 5), (8, 9))}
    assert found.pairs[0].by_chance == {2: pytest.approx(4 / 6)}
    bare = order(tmp_path / "c.csv", "9,8,7,6,5,4,3,2")  # its model is the others'
    assert agree(files[0], bare, remove=2).protected == found.protected
    with pytest.raises(ShortstackError, match="expected 1 to 6 blocks"):
        agree(*files, remove=7)


def test_scores_of_models_of_other_depths_are_refused(tmp_path: Path) -> None:
    ppl = CriterionScores("ppl", (1.0, 2.0), (2, 3))
    for depth in (6, 8):
        Scores("model", "f", tuple(range(depth)), {"ppl": ppl}).save(tmp_path / f"{depth}.json")
    with pytest.raises(ShortstackError, match=r"6\.json ppl is of a model of blocks 0-5, .*8\.json ppl of blocks 0-7"):
        agree(tmp_path / "6.json", tmp_path / "8.json")


def test_nothing_left_to_remove_is_an_error(tmp_path: Path) -> None:
    ppl = CriterionScores("ppl", (1.0, 2.0), (0, 11))
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file in files:
        Scores("model", "f", tuple(range(12)), {"ppl": ppl}).save(file)
    with pytest.raises(ShortstackError, match="every block that was scored is protected") as error:
        agree(*files)
    assert "--no-plus" in error.value.hint


def test_from_two_files_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = order(tmp_path / "a.csv", ",".join(map(str, range(32))))
    out = tmp_path / "agreement.json"
    assert run(["agree", str(a), "published:vicuna-7b-v1.3:ppl", "--remove", "6", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "Kendall's tau" in shown
    assert "published:vicuna-7b-v1.3:ppl" in shown
    record = json.loads(out.read_text())
    assert record["protected"] == [0, 1, 2, 3, 30, 31]
    assert record["pairs"][0]["chosen"]["6"]["only_second"] == [10, 11, 20, 24, 25, 27]
    assert run(["agree", str(a), "published:vicuna-7b-v1.3:ppl", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pairs"][0]["chosen"].keys() == {"4", "8", "12", "16"}


def test_all_criteria_of_a_file_are_set_side_by_side(built: Built, tmp_path: Path) -> None:
    text = texts(tmp_path / "t.jsonl")
    path = tmp_path / "scores.json"
    found = score(
        str(built("llama")),
        data=str(text),
        seq_len=16,
        samples=4,
        criterion="ppl,taylor,magnitude",
        out=path,
        quiet=True,
    )
    names = {(one.first, one.second) for one in agree(path).pairs}
    assert {(a.split()[-1], b.split()[-1]) for a, b in names} == {
        ("ppl", "taylor"),
        ("ppl", "magnitude"),
        ("taylor", "magnitude"),
    }
    (same,) = agree(path, found, criterion="ppl").pairs
    assert same.tau == 1
    assert same.chosen[3][1:] == ((), ())


def test_the_published_model_is_found_by_the_other_files_source(tmp_path: Path) -> None:
    blocks = list(range(32))
    record = {
        "schema": 1, "model": {"source": "lmsys/vicuna-7b-v1.3", "fingerprint": "x", "blocks": 32}, "calibration": {},
        "criteria": {"ppl": {"scores": blocks}}, "settings": {},
    }  # fmt: skip
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(record))
    (pair,) = agree(path, Path("published:ppl")).pairs
    assert pair.second == "published:ppl"
    record["model"]["source"] = "/elsewhere"  # type: ignore[index]
    path.write_text(json.dumps(record))
    with pytest.raises(ShortstackError, match="/elsewhere does not record which published model it is"):
        agree(path, Path("published:ppl"))


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    a, b = order(tmp_path / "a.csv", "0,1,2"), order(tmp_path / "b.csv", "0,1,2,3")
    for arguments, options, message in (
        ((), {}, "no scores given"),
        ((a,), {}, "found only one ranking"),
        ((a, b), {}, r"ranks blocks 0-2, .*b.csv blocks 0-3"),
        ((a, a), {"remove": 4}, "--remove 4: expected 1 to 3 blocks"),
        ((a, tmp_path / "c.csv"), {}, "no such file"),
    ):
        with pytest.raises(ShortstackError, match=message):
            agree(*arguments, **options)  # type: ignore[arg-type]
