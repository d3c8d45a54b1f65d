"""The outputs of the published method's official code on small models: same windows, orders, and every figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shortstack.data.calibration import draw_windows
from shortstack.data.sources import Corpus
from shortstack.data.tokenizer import load_tokenizer
from shortstack.evaluation import ppl as perplexity
from shortstack.families.open_model import open_checkpoint
from shortstack.scoring.criteria import parse_criteria
from shortstack.scoring.score import score_windows

RUNS = ["stories260k", "babyllama105", "gemma-pico"]
LONGEST = ("babyllama105", "wikitext2")  # a token for each character


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Any]:
    return json.loads((shared / "golden" / "golden.json").read_text())


@pytest.mark.parametrize("name", RUNS)
def test_windows(golden: dict[str, Any], shared: Path, name: str) -> None:
    run = golden["runs"][name]
    tokenizer = load_tokenizer(open_checkpoint(shared / run["model"]))
    drawn = draw_windows(
        Corpus("rows", "", golden["rows"]),
        tokenizer,
        samples=run["num_windows"],
        seq_len=run["seq_len"],
        seed=run["seed"],
        sampling="published",
        bos_every=run["bos_every"],
    )
    assert drawn.windows == run["windows"]


@pytest.mark.parametrize("memory", ["streamed", "resident"])
@pytest.mark.parametrize("name", RUNS)
def test_scores_and_orders(golden: dict[str, Any], shared: Path, name: str, memory: Any, tmp_path: Path) -> None:
    run = golden["runs"][name]
    rows = tmp_path / "windows.jsonl"
    rows.write_text("".join(json.dumps({"input_ids": window}) + "\n" for window in run["windows"]))
    checkpoint = open_checkpoint(shared / run["model"])
    windows = draw_windows(Corpus("rows", "", windows=run["windows"]), None)
    found = score_windows(checkpoint, windows, parse_criteria("ppl,taylor,magnitude"), memory=memory)
    for criterion, expected in run["criteria"].items():
        ours = found.criteria[criterion]
        assert list(ours.order) == expected["order"]
        assert ours.scores == pytest.approx(expected["scores"], rel=1e-5)
        tensors = {
            checkpoint.anatomy.block_name(block, name): value
            for block, t in ours.tensors.items()
            for name, value in t.items()
        }
        inside = {k: v for k, v in expected.get("tensors", {}).items() if checkpoint.anatomy.block_of(k) is not None}
        assert tensors == pytest.approx(inside, rel=1e-5)
    without_first = checkpoint.parameters() - checkpoint.block_parameters()[0]
    assert without_first == run["criteria"]["ppl"]["params_after_removing_one"]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        (name, data) if (name, data) != LONGEST else pytest.param(name, data, marks=pytest.mark.slow)
        for name in RUNS
        for data in ("wikitext2", "ptb")
    ],
)
def test_perplexity_of_both_bos_policies(
    golden: dict[str, Any], shared: Path, name: str, data: str, tmp_path: Path
) -> None:
    expected = golden["runs"][name]["eval_ppl"]
    if data == "wikitext2":
        lines = (shared / "data/text/wikitext2/wiki.test.raw").read_text(encoding="utf-8").split("\n")[:800]
        texts = [line + "\n" if line.strip() else "" for line in lines]
    else:
        texts = [line.strip() for line in (shared / "data/text/ptb/ptb.valid.txt").read_text().split("\n")[:600]]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    model = str(shared / golden["runs"][name]["model"])
    (result,) = perplexity.evaluate_ppl(model, data=str(source), seq_len=str(expected["seq_len"]), bos="both").results
    assert result.figures["ppl_128"].value == pytest.approx(expected["bos_first"][data], rel=1e-5)
    assert result.figures["ppl_128_bos_every"].value == pytest.approx(expected["bos_every"][data], rel=1e-5)
    assert result.parameters == expected["params"]
