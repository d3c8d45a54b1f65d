"""`shortstack card`: figures of that very checkpoint, beside the dense model's, in the card and in its metadata."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from shortstack.artifacts.results import Figure, Result, Results
from shortstack.errors import ShortstackError, UsageError
from shortstack.families.open_model import open_checkpoint
from shortstack.inspection.check import check
from shortstack.pruning.prune import prune
from shortstack.publishing.card import card
from shortstack.runtime.hashes import file_sha256
from tests.hub_push_server import card_errors

Built = Callable[..., Path]


@pytest.fixture(scope="module")
def made(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ann") / "p"
    prune(str(built("llama")), blocks="1", out=folder, quiet=True)
    return folder


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "p"))


def result(fingerprint: str, what: str = "ppl", **changes: Any) -> Result:
    """A result of a checkpoint."""
    figures = {
        "ppl": {"ppl_128": Figure(12.3456, 0.5, "ppl", 100)},
        "zeroshot": {
            "arc_easy acc": Figure(0.5, 0.01, "accuracy", 200), "arc_easy acc_norm": Figure(0.25, None, "accuracy", 200),
            "AVE": Figure(0.5, 0.01, "accuracy", 200),
        },
        "bench": {"latency": Figure(0.125, 0.01, "s", 10)},
    }[what]  # fmt: skip
    source = {"ppl": "wikitext2", "zeroshot": "arc_easy", "bench": "batch 1"}[what]
    made = Result(
        "/home/ann/p", fingerprint, what, {"source": source, "sha256": "0", "rows": 3}, {"dtype": "float32", "limit": None},
        figures, 100, 200, 1.0, 1000,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def saved(path: Path, *results: Result) -> Path:
    Results(results).save(path)
    return path


def fingerprints(model: Path) -> tuple[str, str]:
    """(of the checkpoint, of its dense model)."""
    return open_checkpoint(model).fingerprint, json.loads((model / "shortstack.json").read_text())["source_fingerprint"]


def test_figures_beside_the_dense_models_in_table_and_metadata(model: Path, tmp_path: Path) -> None:
    own, dense = fingerprints(model)
    better = result(dense, figures={"ppl_128": Figure(10.0, 0.25, "ppl", 100)})
    other_text = result(own, data={"source": "/home/ann/texts/mine.txt", "sha256": "1", "rows": 3})
    files = [
        saved(tmp_path / "a.json", result(own), better, result("of another model", model="HEALED")),
        saved(tmp_path / "b.json", result(own, "zeroshot"), result(own, "bench"), other_text),
    ]
    done = card(model, *files, base_model="org/base", license="mit", quiet=True)
    assert (done.figures, list(done.files)) == (4, ["README.md"])
    assert any("does not show results of other models: HEALED" in note for note in done.notes)
    text = (model / "README.md").read_text()
    found: Any = ModelCard(text)
    assert (
        "### Perplexity: wikitext2\n\n|  | this model | dense model |\n|---|---:|---:|\n| ppl_128 | 12.35 ±0.5 | 10 ±0.25 |"
        in text
    )
    assert "| ppl_128 | 12.35 ±0.5 |\n" in text  # of the other text, which the dense model was not measured on
    assert "| arc_easy acc | 50.0% ±1.0 |" in text
    assert "| latency | 0.125 ±0.01 |" in text
    assert (found.data.base_model, found.data.license) == ("org/base", "mit")
    entries = [(e.dataset_type, e.dataset_config, e.metric_type, e.metric_value) for e in found.data.eval_results or []]
    assert entries == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "perplexity", 12.3456),
        ("allenai/ai2_arc", "ARC-Easy", "acc", 50.0),
        ("allenai/ai2_arc", "ARC-Easy", "acc_norm", 25.0),
        ("mine.txt", None, "perplexity", 12.3456),
    ]
    assert card_errors(text) == []
    assert str(ModelCard(text)) == text
    assert "/home/ann" not in text
    assert {f.what: f.status for f in check(str(model), quiet=True).findings}["recorded hashes"] == "ok"


def test_base_model_and_licence_stay_when_it_is_renewed_and_in_what_is_made_of_it(model: Path, tmp_path: Path) -> None:
    card(model, base_model="org/base", license="mit", quiet=True)
    card(model, quiet=True)
    prune(str(model), blocks="2", out=tmp_path / "q", quiet=True)
    for folder in (model, tmp_path / "q"):
        data = ModelCard.load(folder / "README.md").data
        assert (data.base_model, data.license) == ("org/base", "mit")


def test_nothing_but_card_and_record_is_written(model: Path, tmp_path: Path) -> None:
    def state() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in model.iterdir()}

    before = state()
    card(model, saved(tmp_path / "a.json", result(fingerprints(model)[0])), quiet=True)
    assert {name for name, time in state().items() if before.get(name) != time} == {"README.md", "shortstack.json"}
    assert before.keys() == state().keys()


def test_accuracies_on_complete_tasks_in_the_hubs_other_form(model: Path, tmp_path: Path) -> None:
    own, _ = fingerprints(model)
    done = card(model, saved(tmp_path / "a.json", result(own, "zeroshot")), eval_results=True, quiet=True)
    name = ".eval_results/shortstack.yaml"
    assert list(done.files) == ["README.md", name]
    entries = parse_eval_result_entries(yaml.safe_load((model / name).read_text()))
    assert [(e.dataset_id, e.task_id, e.value) for e in entries] == [
        ("allenai/ai2_arc", "arc_easy", 50.0)
    ]  # its own metric
    assert "zero-shot" in str(entries[0].notes)
    assert json.loads((model / "shortstack.json").read_text())["files"][name] == file_sha256(model / name)
    for other in (result(own), result(own, "zeroshot", settings={"limit": 10})):
        with pytest.raises(UsageError, match="no file has the accuracy on all rows"):
            card(model, saved(tmp_path / "b.json", other), eval_results=True, quiet=True)


def test_results_of_other_models_are_refused(model: Path, tmp_path: Path) -> None:
    before = (model / "README.md").read_bytes()
    _, dense = fingerprints(model)
    for file in (saved(tmp_path / "a.json", result("0" * 64)), saved(tmp_path / "b.json", result(dense))):
        with pytest.raises(ShortstackError, match="has no result of the current") as caught:
            card(model, file, quiet=True)
        assert "shortstack eval ppl" in caught.value.hint
    assert (model / "README.md").read_bytes() == before


def test_results_from_before_the_checkpoint_was_changed_are_refused(model: Path, tmp_path: Path) -> None:
    file = saved(tmp_path / "a.json", result(fingerprints(model)[0]))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
    with pytest.raises(ShortstackError, match="has no result of the current"):
        card(model, file, quiet=True)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": 1}', "\x00"])
def test_damaged_results(model: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ShortstackError, match="results"):
        card(model, tmp_path / "a.json", quiet=True)


@pytest.mark.fault(76)
def test_what_results_name_cannot_become_markup(model: Path, tmp_path: Path) -> None:
    own, _ = fingerprints(model)
    evil = "<script>|`x`\n---\nlicense: mit\n---\n[a](http://evil)"
    file = saved(
        tmp_path / "a.json",
        result(
            own,
            data={"source": evil, "sha256": "0"},
            figures={evil: Figure(1.0, None, evil, 1)},
            notes=[evil],
            settings={"dtype": evil},
        ),
    )
    card(model, file, quiet=True)
    text = (model / "README.md").read_text()
    found: Any = ModelCard(text)
    assert found.data.license is None
    assert card_errors(text) == []
    assert not any(mark in found.text for mark in ("<script", "](http://evil", "`x`"))


def test_an_edited_card_is_kept_unless_forced(model: Path) -> None:
    path = model / "README.md"
    path.write_text(path.read_text().replace("library_name", "license: mit\nlibrary_name", 1) + "My own words.\n")
    with pytest.raises(ShortstackError, match="was edited since it was written"):
        card(model, quiet=True)
    assert "My own words" in path.read_text()
    card(model, force=True, quiet=True)
    assert "My own words" not in path.read_text()
    assert ModelCard.load(path).data.license == "mit"
    path.unlink()
    card(model, quiet=True)  # one that is not there is written


@pytest.mark.parametrize("name", ["../x", "org/name@v2", "./x", "a b", ""])
def test_names_that_are_no_base_model(model: Path, name: str) -> None:
    with pytest.raises(UsageError, match="expected an id on the hub"):
        card(model, base_model=name, quiet=True)


def test_folders_that_shortstack_did_not_make_and_the_hubs_cache(built: Built, model: Path, tmp_path: Path) -> None:
    for folder in (built("llama"), tmp_path):
        with pytest.raises(ShortstackError, match="was not made by shortstack"):
            card(folder, quiet=True)
    with pytest.raises(ShortstackError, match="no such directory"):
        card(tmp_path / "nowhere", quiet=True)
    snapshot = tmp_path / "models--a--b/snapshots" / ("a" * 40)
    shutil.copytree(model, snapshot)
    with pytest.raises(ShortstackError, match="cache of the hub"):
        card(snapshot, quiet=True)


def test_figures_of_retraining_are_in_the_table(model: Path) -> None:
    rows = {"before": {"parameters": 1000, "figures": {"validation": 3.0, "ppl:/home/ann/t.txt": 20.0}},
            "after": {"parameters": 1000, "figures": {"validation": 2.5, "ppl:/home/ann/t.txt": 12.0}}}  # fmt: skip
    (model / "retraining.json").write_text(json.dumps({"models": rows}))
    card(model, quiet=True)
    text = (model / "README.md").read_text()
    assert "|  | parameters | validation loss (nats per token) | ppl:t.txt |" in text
    assert "| after | 1k | 2.5 | 12 |" in text
    for damaged in ("", "{}", '{"models": {"before": 3}}', "[]"):
        (model / "retraining.json").write_text(damaged)
        card(model, quiet=True)
        assert "Retraining" not in (model / "README.md").read_text()


def test_speed_beside_the_dense_models_which_has_other_blocks(model: Path, tmp_path: Path) -> None:
    own, dense = fingerprints(model)
    machines = [{"bytes_per_second": rate} for rate in (1e9, 2e9)]
    rows = [
        result(
            fingerprint, "bench", settings={"dtype": "float32", "blocks": blocks, "machine": machine}, figures=figures
        )
        for fingerprint, blocks, machine, figures in (
            (dense, 6, machines[0], {"latency": Figure(0.25, None, "s", 10)}),
            (own, 5, machines[1], {"latency": Figure(0.125, None, "s", 10)}),
        )
    ]
    card(model, saved(tmp_path / "b.json", *rows), quiet=True)
    assert "| latency | 0.125 | 0.25 |" in (model / "README.md").read_text()


@pytest.mark.parametrize("name", ["", "MIT licence", "mit\nlicense_link: x"])
def test_a_licence_that_the_hub_cannot_name(name: str, model: Path) -> None:
    before = (model / "README.md").read_bytes()
    with pytest.raises(UsageError, match="expected the hub's name of a licence"):
        card(model, license=name, quiet=True)
    assert (model / "README.md").read_bytes() == before
