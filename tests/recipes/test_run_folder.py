"""The folder of a run: what a person reads there, what it is known by, and folders that are something else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from shortstack.errors import ShortstackError
from shortstack.families.open_model import open_checkpoint
from shortstack.recipes.dry_run import Rehearsal
from shortstack.recipes.run import run
from tests.recipes.runs import STEPS, done, states

Built = Callable[..., Path]


def test_a_run_leaves_a_folder_that_a_person_can_read(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = done(recipe, out)
    assert list(states(result).values()) == ["done"] * 6
    left = {path.name for path in out.iterdir()}
    assert left == {"run.json", "recipe.yaml", "logs", *STEPS}
    assert {path.name for path in (out / "logs").iterdir()} == {f"{step}.log" for step in STEPS}
    assert open_checkpoint(out / "prune").depth == open_checkpoint(out / "cpt").depth == 4
    assert (out / "score/csv/ppl_n4/block_order.csv").is_file()
    record = json.loads((out / "run.json").read_text())
    assert record["order"] == STEPS
    assert all(record["steps"][step]["state"] == "done" for step in STEPS)
    assert "logits equal bit for bit" in (out / "logs/prune.log").read_text()
    assert "ppl_16" in (out / "logs/ppl.log").read_text()
    names = [result["model"] for result in json.loads((out / "ppl/results.json").read_text())]
    assert names == [record["model"], str(out / "prune"), str(out / "cpt")]
    text = result.to_text()
    assert "ppl on" in text  # what the last step found
    assert json.loads(json.dumps(result.to_json()))["steps"][2]["stage"] == "retrain cpt"


def test_what_is_written_down_names_files_in_full(
    recipe: Path, built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "model").symlink_to(built("llama"))
    monkeypatch.chdir(tmp_path)
    only = [f"{step}=null" for step in STEPS[1:]]
    done("mine.yaml", Path("out"), model="model", set_=[*only, "score.data=text.jsonl"])
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = done("../out/recipe.yaml", Path("out"))
    assert states(again) == {"score": "done"}
    one, other = (json.loads((tmp_path / place / "out/score/scores.json").read_text()) for place in (".", "elsewhere"))
    assert one["criteria"] == other["criteria"]


def test_a_run_folder_moves(recipe: Path, tmp_path: Path) -> None:
    done(recipe, tmp_path / "out", set_=["ppl=null", "compare=null", "check=null"])
    (tmp_path / "out").rename(tmp_path / "moved")
    result = done(recipe, tmp_path / "moved", set_=["ppl=null", "compare=null", "check=null"])
    assert set(states(result).values()) == {"skipped"}


def test_folders_that_are_something_else(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("x")
    with pytest.raises(ShortstackError, match="exists and holds no run of shortstack"):
        done(recipe, out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    (out / "run.json").write_text("{")
    with pytest.raises(ShortstackError, match=r"run.json: cannot be read"):
        done(recipe, out)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ShortstackError, match="exists and is not a directory"):
        done(recipe, tmp_path / "file")
    done(recipe, tmp_path / "other", set_=[f"{step}=null" for step in STEPS[1:]])
    other = recipe.with_name("other.yaml")
    other.write_text(recipe.read_text().replace("small, whole", "another"))
    with pytest.raises(ShortstackError, match=r"holds a run of .*mine.yaml, not of .*other.yaml"):
        done(other, tmp_path / "other")
    foreseen = run(str(other), out=tmp_path / "other", dry_run=True)
    assert isinstance(foreseen, Rehearsal)
    assert any("holds a run of" in problem for problem in foreseen.problems)
    same_name = tmp_path / "elsewhere" / recipe.name
    same_name.parent.mkdir()
    same_name.write_text(other.read_text())
    with pytest.raises(ShortstackError, match=rf"holds a run of {recipe}, not of {same_name}"):
        done(same_name, tmp_path / "other")


@pytest.mark.fault(142)
def test_a_recipe_is_known_by_what_it_is_and_not_by_how_it_is_named(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative, absolute, through a link, as a copy, and from another folder: one run."""
    monkeypatch.chdir(tmp_path)
    only = [f"{step}=null" for step in STEPS[1:]]
    out = tmp_path / "out"
    assert states(done("mine.yaml", out, set_=only)) == {"score": "done"}
    (tmp_path / "link.yaml").symlink_to(recipe)
    (tmp_path / "copy.yaml").write_text(recipe.read_text())
    for name in ("./mine.yaml", str(recipe), "link.yaml", "copy.yaml", str(out / "recipe.yaml")):
        assert states(done(name, out, set_=[] if name.endswith("recipe.yaml") else only)) == {"score": "skipped"}, name
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    recipe.write_text(recipe.read_text().replace("small, whole", "the same file, edited"))
    assert states(done("../mine.yaml", out, set_=only)) == {"score": "skipped"}


def test_what_an_earlier_version_recorded_is_resumed_by_name(recipe: Path, tmp_path: Path) -> None:
    only = [f"{step}=null" for step in STEPS[1:]]
    done(recipe, tmp_path / "out", set_=only)
    record = json.loads((tmp_path / "out/run.json").read_text())
    del record["file"]
    (tmp_path / "out/run.json").write_text(json.dumps(record))
    recipe.write_text(recipe.read_text().replace("small, whole", "edited"))
    assert states(done(recipe, tmp_path / "out", set_=only)) == {"score": "skipped"}


def test_two_runs_do_not_share_a_folder(recipe: Path, tmp_path: Path) -> None:
    from shortstack.runtime.atomic_output import locked

    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"), pytest.raises(ShortstackError, match="another shortstack process is writing it"):
        done(recipe, tmp_path / "out")
