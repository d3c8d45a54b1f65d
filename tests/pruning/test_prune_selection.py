"""`prune --selection` chooses as `search` does, and leaves the search's plan in its output."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import shortstack
from shortstack.artifacts.plan import load_plan
from shortstack.cli.app import run
from shortstack.engine.streamed import StreamedModel
from shortstack.errors import ShortstackError, UsageError
from shortstack.pruning import prune as pruning

Built = Callable[..., Path]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of sets of each measurement."""
    real, made = StreamedModel.nll_without, []

    def measure(self: StreamedModel, ids: torch.Tensor, sets: Any, *more: Any, **named: Any) -> torch.Tensor:
        made.append(len(sets))
        return real(self, ids, sets, *more, **named)

    monkeypatch.setattr(StreamedModel, "nll_without", measure)
    return made


def pruned(model: Path, data: str, out: Path, **options: Any) -> Any:
    windows = {"data": data, "samples": 3, "seq_len": 16}
    return shortstack.prune(str(model), out=out, **{**windows, "selection": "greedy", "quiet": True, **options})


def beside(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"rows.jsonl"}


@pytest.mark.parametrize("selection", ["greedy", "one-shot", "contiguous", "beam:2", "evolution:2", "swaps:2"])
def test_the_set_and_the_plan_are_those_of_search(built: Built, data: str, tmp_path: Path, selection: str) -> None:
    model, out = built("llama"), tmp_path / "p"
    options: dict[str, Any] = {"data": data, "samples": 3, "seq_len": 16, "selection": selection, "remove": 2}
    searched = shortstack.search(str(model), quiet=True, **options)
    made = pruned(model, data, out, selection=selection, remove=2, verify=True)
    assert made.plan.to_json() == searched.to_json() == load_plan(out / "plan.json").to_json()
    assert made.logits_compared
    record = json.loads((out / "shortstack.json").read_text())
    assert record["steps"][0]["why"]["measured"] == searched.why["measured"]
    assert record["files"]["plan.json"] == made.files["plan.json"]
    assert not [one for one in shortstack.check(str(out)).findings if one.status == "fail"]
    assert beside(tmp_path) == {"p"}


def test_it_says_what_the_set_costs_and_what_each_source_pays(
    built: Built, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = f"books={data},sums={data}"
    for objective, said in (("worst", "of its dense loss on the worst source"), ("mean", "nats, mean")):
        made = pruned(
            built("llama"), named, tmp_path / objective, remove=2, samples=2, objective=objective, quiet=False
        )
        text = made.to_text()
        assert f"increase of perplexity for each source (the set is chosen for {objective})" in text
        measured = made.plan.why["measured"]
        assert f"where the dense model has a perplexity of {measured['dense_ppl']:.4g}" in text
        assert f"{measured['sets'][0]['increase']:+.1%}" in text
        assert said in capsys.readouterr().err


def test_a_search_that_was_killed_resumes(
    built: Built, data: str, tmp_path: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = built("llama"), tmp_path / "p"
    expected = pruned(model, data, tmp_path / "whole", remove=2).plan.removed
    assert calls == [7, 5, 4]  # single blocks, pairs, what judges
    with monkeypatch.context() as broken:
        broken.setattr(pruning, "write_pruned", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pruned(model, data, out, remove=2)
    assert not out.exists()
    calls.clear()
    assert pruned(model, data, out, remove=2).plan.removed == expected
    assert calls == []
    assert beside(tmp_path) == {"p", "whole"}


def test_an_output_that_may_not_be_written_is_refused_before_anything_is_measured(
    built: Built, data: str, tmp_path: Path, calls: list[int]
) -> None:
    model = built("llama")
    pruned(model, data, tmp_path / "p", remove=1)
    calls.clear()
    with pytest.raises(ShortstackError, match="exists already"):
        pruned(model, data, tmp_path / "p", remove=1)
    with pytest.raises(ShortstackError, match="never touched"):
        pruned(model, data, model / "p", remove=1)
    assert calls == []
    pruned(model, data, tmp_path / "p", remove=2, force=True)


def test_the_plan_is_not_carried_on(built: Built, data: str, tmp_path: Path) -> None:
    """It says what was removed in that step alone."""
    pruned(built("llama"), data, tmp_path / "p", remove=1)
    shortstack.prune(str(tmp_path / "p"), blocks=str(load_plan(tmp_path / "p/plan.json").kept[0]), out=tmp_path / "q")
    assert not (tmp_path / "q/plan.json").exists()


def test_a_choice_as_plan_takes_it_is_taken_too(built: Built, tmp_path: Path) -> None:
    made = shortstack.prune(str(built("llama")), choice=shortstack.BlockChoice(blocks="1"), out=tmp_path / "p")
    assert made.plan.removed == (1,)


def test_what_is_left_is_repaired_between_the_steps(
    built: Built, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step scores a checkpoint whose cuts are repaired. The output is repaired once, at the end."""
    from shortstack.families.open_model import open_model

    changed: list[int] = []

    def noted(folder: str) -> Any:
        found = open_model(folder)
        changed.append(len((found.provenance or {})["steps"]))
        return found

    monkeypatch.setattr("shortstack.pruning.rescoring.open_model", noted)
    given = {"data": data, "samples": 2, "seq_len": 16, "quiet": True, "dtype": "float32", "repair": "linear"}
    made = shortstack.prune(
        str(built("llama")),
        selection="greedy",
        rescore="ppl",
        remove=3,
        repair_between=True,
        out=tmp_path / "p",
        **given,
    )
    assert 4 in changed  # two blocks gone, and a repair behind each
    blocks = ",".join(map(str, made.plan.removed))
    shortstack.prune(str(built("llama")), blocks=blocks, out=tmp_path / "q", **given)
    assert (tmp_path / "p/model.safetensors").read_bytes() == (tmp_path / "q/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"blocks": "1"}, "--selection searches the blocks; --blocks contradicts it"),
        ({"scores": "scores.json", "remove": 1}, "--selection searches the blocks; --scores contradicts it"),
        ({"plan": "plan.json"}, "--plan names the blocks"),
        ({"remove": 1, "criterion": "ppl"}, "--criterion ppl: no effect with --selection"),
        ({"remove": 1, "strategy": "contiguous"}, "--strategy contiguous: no effect with --selection"),
        ({"remove": 1, "repair_between": True}, "--repair-between: no effect without --repair and --rescore"),
        ({"remove": 1, "repair_between": True, "rescore": "ppl"}, "--repair-between: no effect"),
        ({"remove": 1, "selection": "gredy"}, "no such selection"),
        ({}, "give one of --remove, --ratio, --params"),
        ({"selection": None, "blocks": "1"}, "no effect without --selection"),
        ({"selection": None, "blocks": "1", "data": "embedded", "samples": 10, "seq_len": 128, "dtype": "float32"},
         "--dtype float32: no effect without --selection"),
    ],
)  # fmt: skip
def test_options_that_contradict_one_another(
    built: Built, data: str, tmp_path: Path, given: dict[str, Any], says: str
) -> None:
    from shortstack.pruning.prune import prune

    options = {"data": data, "samples": 3, "seq_len": 16, "selection": "greedy", "quiet": True, **given}
    with pytest.raises(UsageError, match=says):
        prune(str(built("llama")), out=tmp_path / "p", **options)
    assert beside(tmp_path) == set()


def test_on_the_command_line(built: Built, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"prune {built('llama')} --selection greedy --remove 2 --data {data} --samples 3 --seq-len 16 --out"
    assert run([*line.split(), str(tmp_path / "p")]) == 0
    told = capsys.readouterr()
    assert "removed" in told.out
    assert "perplexity" in told.err
