"""The quickstart and the example: the first things that a newcomer runs."""

from __future__ import annotations

import importlib.util
import itertools
import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from shortstack.checkpoint.hub import EMBEDDED_MODEL
from shortstack.cli.app import run
from shortstack.common.assets import ASSETS
from shortstack.errors import ShortstackError
from shortstack.families.open_model import open_checkpoint
from shortstack.recipes.quickstart import card_perplexity, check_dense, quickstart

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    out = tmp_path_factory.mktemp("quick") / "out"
    command = [sys.executable, "-m", "shortstack", "quickstart", "--out", str(out)]
    return out, subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_quickstart_ends_well_and_leaves_everything(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, done = finished
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    names = {path.name for path in out.iterdir()}
    assert {
        "score",
        "plan",
        "pruned",
        "retrained",
        "ppl",
        "samples",
        "report",
        "run.json",
        "recipe.yaml",
        "quickstart.json",
    } <= names
    assert json.loads((out / "run.json").read_text())["recipe"] == "quickstart"
    assert open_checkpoint(out / "pruned").depth == open_checkpoint(out / "retrained").depth == 9
    stages = [step["stage"] for step in json.loads((out / "retrained/shortstack.json").read_text())["steps"]]
    assert stages == ["prune", "retrain"]


def test_quickstart_shows_what_it_cost(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, done = finished
    record = json.loads((out / "quickstart.json").read_text())
    dense, pruned, retrained = (record["models"][name] for name in ("dense", "pruned", "retrained"))
    assert dense["ppl"] == pytest.approx(record["card_ppl"], rel=0.1)
    assert dense["ppl"] < retrained["ppl"] < pruned["ppl"]
    assert retrained["parameters"] == pruned["parameters"]
    assert pruned["parameters"] < dense["parameters"]
    assert dense["change"] is None
    for row in (pruned, retrained):
        assert row["change"]["value"] == pytest.approx(row["ppl"] / dense["ppl"] - 1)
        assert row["change"]["stderr"] < row["stderr"] / dense["ppl"] / 3  # pairs of windows tell more
    assert f"{dense['ppl']:.2f}" in done.stdout
    assert "[dense]" in done.stdout
    assert "shortstack score MODEL" in done.stdout
    assert "lowest = least important" in done.stderr
    assert f"The report is {out / 'report/report.html'}: open it in a browser." in done.stdout
    page = (out / "report/report.html").read_text()
    for part in ("3 of the 12 blocks of embedded are removed", f"dense {dense['ppl']:.4g}, pruned {pruned['ppl']:.4g}"):
        assert part in page
    assert "shortstack retrain distill pruned --teacher embedded --data embedded" in page
    assert str(out.parent) not in page


def test_the_second_time_every_step_is_done_already(
    finished: tuple[Path, subprocess.CompletedProcess[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, done = finished
    assert run(["quickstart", "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert shown.err.count("done by an earlier run") == 8
    table = [line for line in done.stdout.splitlines() if line.startswith(("dense", "pruned", "retrained"))]
    assert [line for line in shown.out.splitlines() if line in table] == table
    assert run(["run", "quickstart", "--out", str(out)]) == 0  # the command is the recipe of that name
    assert capsys.readouterr().err.count("done by an earlier run") == 8


@pytest.mark.slow
def test_with_force_everything_is_done_again(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, _ = finished
    before = (out / "pruned/config.json").stat().st_mtime_ns
    assert run(["quickstart", "--out", str(out), "--quiet", "--force"]) == 0
    assert (out / "pruned/config.json").stat().st_mtime_ns != before


@pytest.mark.slow
def test_without_its_packages_retraining_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else real(name))
    found = quickstart(out=tmp_path / "out", quiet=True)
    assert list(found.rows) == ["dense", "pruned"]
    assert not (tmp_path / "out/retrained").exists()


def test_a_dense_perplexity_that_is_not_the_cards_fails() -> None:
    card = card_perplexity()
    check_dense(card * 1.09, card)
    for wrong in (card * 1.11, card * 0.89, float("nan")):
        with pytest.raises(ShortstackError, match="gives wrong results"):
            check_dense(wrong, card)


def test_the_embedded_model_teaches() -> None:
    """Single removals differ clearly, and a quarter less is recognisably the same model (from its training log)."""
    log = (ASSETS / "training.log").read_text().splitlines()
    (line,) = [line for line in log if line.startswith("held-out ppl without block i: ")]
    costs = sorted(float(part) / card_perplexity() - 1 for part in line.rpartition(": ")[2].split())
    assert costs[0] > 0
    gaps = [b / a for a, b in itertools.pairwise(costs)]
    assert costs[-1] > 1
    assert sum(gap > 1.05 for gap in gaps) >= 8
    (quarter,) = [line for line in log if line.startswith("held-out ppl without blocks ")]
    assert float(quarter.rpartition(": ")[2]) < 1.6 * card_perplexity()


def test_the_embedded_model_is_what_the_design_asks_for() -> None:
    checkpoint = open_checkpoint("embedded")
    config = checkpoint.config
    assert checkpoint.depth >= 12
    assert config["hidden_size"] % 128 == 0
    assert config["intermediate_size"] % 128 == 0
    assert config["head_dim"] == 32
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {"BF16"}
    assert sum(path.stat().st_size for path in EMBEDDED_MODEL.iterdir()) <= 6_000_000


def test_the_example_runs(
    built: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = built("llama", num_hidden_layers=12, max_position_embeddings=256)
    monkeypatch.setattr(sys, "argv", ["score_and_prune.py", str(model), str(tmp_path / "p")])
    runpy.run_path(str(ROOT / "examples/score_and_prune.py"), run_name="__main__")
    assert "equal bit for bit" in capsys.readouterr().out
    assert open_checkpoint(tmp_path / "p").depth == 9
