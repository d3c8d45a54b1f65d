"""All evaluations in one call: the same figures as each by itself, each model loaded once, and what they took."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shortstack.cli.app import run
from shortstack.evaluation import prompts
from shortstack.evaluation.all import evaluate_all
from shortstack.evaluation.generation import evaluate_generation
from shortstack.evaluation.options import EvaluationOptions
from shortstack.evaluation.ppl import evaluate_ppl
from shortstack.evaluation.zeroshot import evaluate_zeroshot
from shortstack.pruning.prune import prune
from tests import pico
from tests.evaluation import material

pytest.importorskip("lm_eval")
FRESH = EvaluationOptions(quiet=True, fresh=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, a pruned one, texts and tasks."""
    folder = tmp_path_factory.mktemp("all")
    dense = pico.build(folder / "dense", max_position_embeddings=512)
    prune(str(dense), blocks="2,3", out=folder / "pruned", quiet=True)
    (folder / "ptb").mkdir()
    (folder / "ptb/ptb.valid.txt").write_text("some words of a row \n and of another row \n" * 20)
    material.published(folder / "tasks")
    return folder


def test_all_is_each_and_a_model_is_loaded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shortstack.engine.load as loading

    loaded: list[str] = []
    real = loading.load_model

    def counted(checkpoint: Any, **options: Any) -> Any:
        loaded.append(Path(checkpoint.source).name)
        return real(checkpoint, **options)

    monkeypatch.setattr(loading, "load_model", counted)
    few = folder / "prompts.json"
    few.write_text(json.dumps(json.loads(prompts._PROMPTS.read_bytes())[::8]))
    monkeypatch.setattr(prompts, "_PROMPTS", few)
    models = [str(folder / "dense"), str(folder / "pruned")]
    common = {"data": "ptb", "data_dir": folder, "seq_len": "64"}
    found = evaluate_all(
        *models, **common, tasks="piqa,boolq", tasks_dir=folder / "tasks", out=folder / "all.json", options=FRESH
    )
    assert loaded == ["dense", "pruned", "dense"]  # the last time as the judge of what both wrote
    by_kind = {(result.model, result.what): result for result in found.results}
    assert set(by_kind) == {(model, what) for model in models for what in ("ppl", "zeroshot", "generation", "samples")}
    alone = [
        *evaluate_ppl(*models, **common, options=FRESH).results,
        *evaluate_zeroshot(*models, tasks="piqa,boolq", tasks_dir=folder / "tasks", options=FRESH).results,
        *evaluate_generation(*models, options=FRESH).results,
    ]
    for result in alone:
        assert by_kind[result.model, result.what].figures == result.figures
        assert by_kind[result.model, result.what].per_item == result.per_item
    for result in found.results:
        assert result.parameters > 0
        assert result.nbytes > 0
        assert result.seconds > 0
        assert result.peak_rss_bytes > 1 << 20


def test_and_compared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compare", str(folder / "all.json"), "--out", str(folder / "c.json")]) == 0
    shown = capsys.readouterr().out
    for word in (
        "ppl on ptb",
        "zeroshot on piqa, boolq",
        "generation on shortstack's own prompts",
        "AVE",
        "difference",
    ):
        assert word in shown
    assert json.loads((folder / "c.json").read_text())["models"] == [str(folder / "dense"), str(folder / "pruned")]


_PEAKS = """
from shortstack.runtime.memory import used
import numpy as np
with used() as large:
    block = np.ones(200 << 20, dtype=np.uint8)
    del block
with used() as small:
    pass
print(large.peak_rss_bytes - small.peak_rss_bytes, large.seconds)
"""


def test_peak_memory_is_that_of_the_work_alone() -> None:
    """In a process of its own: one that has freed much takes new memory from what it kept."""
    done = subprocess.run([sys.executable, "-c", _PEAKS], capture_output=True, text=True, check=True, timeout=60)
    more, seconds = map(float, done.stdout.split())
    assert more > 150 << 20
    assert seconds > 0
