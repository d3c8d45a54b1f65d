"""What an earlier run made is skipped as long as all that made it is the same, and is never thrown away unasked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from shortstack.cli.app import run as cli
from shortstack.errors import ShortstackError
from tests.recipes.runs import STEPS, done, states


def test_what_is_done_is_passed_by_and_what_is_written_down_runs_the_same(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    first = done(recipe, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    second = done(recipe, out)
    assert set(states(second).values()) == {"skipped"}
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before
    assert second.steps[-1].text == first.steps[-1].text
    assert cli(["run", str(out / "recipe.yaml"), "--out", str(tmp_path / "again"), "--quiet"]) == 0
    one, other = ((folder / "cpt/model.safetensors").read_bytes() for folder in (out, tmp_path / "again"))
    assert one == other


def test_everything_that_makes_a_step_counts(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done(recipe, out, set_=["check=null", "compare=null"])
    kept = {path: path.read_bytes() for path in (out / "cpt").iterdir()}
    for change, message in (
        ({"set_": ["prune.remove=1"]}, r"step prune: was made with other settings .*: options.remove was 2, now 1"),
        (
            {"dtype": "bfloat16"},
            "step score: was made with other settings .*: options.dtype was not there, now bfloat16",
        ),
        ({"model": "embedded"}, "step score: was made with other settings .*: options.model was "),
    ):
        with pytest.raises(ShortstackError, match=message) as caught:
            done(recipe, out, **{"set_": ["check=null", "compare=null"], **change})
        assert "or --force" in caught.value.hint
    with (tmp_path / "text.jsonl").open("a") as stream:
        stream.write('{"text": "another line"}\n')
    with pytest.raises(ShortstackError, match="step score: was made with other settings .*options.data was"):
        done(recipe, out)
    assert {path: path.read_bytes() for path in (out / "cpt").iterdir()} == kept


def test_only_what_changed_and_what_follows_is_made_again(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done(recipe, out)
    again = done(recipe, out, set_=["cpt.max_steps=2"], force=True)
    assert states(again) == dict(zip(STEPS, ["skipped", "skipped", "done", "done", "done", "done"], strict=True))
    assert json.loads((out / "cpt/shortstack.json").read_text())["steps"][-1]["steps"] == 2
    from_ppl = done(recipe, out, set_=["cpt.max_steps=2"], from_="ppl")
    assert list(states(from_ppl).values()) == ["skipped"] * 3 + ["done"] * 3
    with pytest.raises(ShortstackError, match="--from pl: there is no step named 'pl'"):
        done(recipe, out, from_="pl")


def test_an_output_that_was_changed_or_lost(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    small = {"set_": [f"{step}=null" for step in ("cpt", "ppl", "check", "compare")]}
    done(recipe, out, **small)
    scores = out / "score/scores.json"
    original = scores.read_text()
    scores.write_text(original.replace('"seconds"', '"seconds" '))
    with pytest.raises(ShortstackError, match=r"step score: .*scores.json was changed since"):
        done(recipe, out, **small)
    assert scores.read_text() != original  # an edit by hand is not thrown away
    scores.write_text(original)
    (out / "prune/config.json").unlink()
    with pytest.raises(ShortstackError, match="step prune: .*prune was changed since"):
        done(recipe, out, **small)

    shutil.rmtree(out / "prune")
    assert list(states(done(recipe, out, **small)).values()) == ["skipped", "done"]
