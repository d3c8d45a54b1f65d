"""Records of a tiny model that was scored, pruned, retrained and measured, made by hand: no model is run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from shortstack.artifacts.plan import PrunePlan
from shortstack.artifacts.results import Figure, Result, Results, mean_figure, perplexity_figure
from shortstack.artifacts.scores import CriterionScores, Scores
from shortstack.common.json_text import json_text

DENSE, PRUNED, RETRAINED = "d" * 64, "a" * 64, "b" * 64
PARAMETERS = {DENSE: 1200, PRUNED: 900, RETRAINED: 900}
NLL = {DENSE: [2.0, 2.2, 1.9, 2.1], PRUNED: [2.31, 2.5, 2.22, 2.4], RETRAINED: [2.0, 2.21, 1.9, 2.09]}


def scores(**changes: Any) -> Scores:
    """Four blocks by two criteria."""
    found = Scores(
        source="org/tiny",
        fingerprint=DENSE,
        blocks=(0, 1, 2, 3),
        criteria={
            "ppl": CriterionScores("ppl", (90.0, 8.0, 8.4, 9.5), (0, 1, 2, 3), (0.2, 0.02, 0.03, 0.02), 7.4),
            "magnitude": CriterionScores("magnitude", (4.0, 3.0, 1.0, 2.0), (0, 1, 2, 3)),
        },
        calibration={
            "source": "texts",
            "samples": 4,
            "seq_len": 16,
            "seed": 1,
            "sampling": "documents",
            "bos_every": False,
        },
        settings={"dtype": "float32", "versions": {"shortstack": "0", "torch": "2"}},
    )
    return replace(found, **changes)


def plan(**changes: Any) -> PrunePlan:
    """The second block of four goes."""
    found = PrunePlan(
        "org/tiny", DENSE, (0, 1, 2, 3), (1,), (0, 3), "ppl",
        {"parameters": 1200, "bytes": 2400, "kv_bytes_per_token": 64},
        {"parameters": 900, "bytes": 1800, "kv_bytes_per_token": 48},
    )  # fmt: skip
    return replace(found, **changes)


def result(model: str, fingerprint: str, what: str, **changes: Any) -> Result:
    """A result without figures."""
    parameters = PARAMETERS.get(fingerprint, 1000)
    return replace(Result(model, fingerprint, what, {}, {}, {}, parameters, 2 * parameters, 1.0, 5000), **changes)


def ppl(model: str, fingerprint: str, **changes: Any) -> Result:
    """Perplexity over four windows."""
    nll = NLL.get(fingerprint, [3.0, 3.1, 3.0, 3.2])
    found = result(
        model, fingerprint, "ppl",
        data={"source": "texts", "sha256": "1" * 64, "rows": 4},
        settings={"dtype": "float32", "tokenizer": "t" * 64, "seq_len": [16], "bos_token": 1},
        figures={"ppl_16": perplexity_figure(nll, 15)},
        per_item={"ppl_16": nll},
    )  # fmt: skip
    return replace(found, **changes)


def zeroshot(model: str, fingerprint: str, right: list[int]) -> Result:
    """One task of a few rows."""
    values = [float(one) for one in right]
    return result(
        model, fingerprint, "zeroshot", data={"source": "tasks", "sha256": "2" * 64, "tasks": {"boolq": {}}},
        figures={"boolq acc": mean_figure(values, "accuracy")}, per_item={"boolq acc": values},
    )  # fmt: skip


def bench(model: str, fingerprint: str, latency: list[float]) -> Result:
    """Times of a few runs, with floors."""
    settings = {
        "engine": "transformers", "engine_version": "5", "batch": 1, "prompt_tokens": 8, "prompt": "a prompt of 8 tokens",
        "new_tokens": 4, "sampling": "greedy", "seed": 1, "runs": len(latency), "warmup": 1, "threads": 1,
        "blocks": 4 if fingerprint == DENSE else 3, "dtype": "float32", "device": "cpu",
        "machine": {"bytes_per_second": 1e9, "operations_per_second": 1e9},
    }  # fmt: skip
    half = [one / 2 for one in latency]
    figures = {
        "latency": mean_figure(latency, "s"), "prefill": mean_figure(half, "s"), "tpot": mean_figure([0.01], "s"),
        "latency_variation": Figure(0.01, None, "share", 3), "prefill_floor": Figure(0.1, None, "s", 1),
        "tpot_floor": Figure(0.002, None, "s", 1), "throughput": mean_figure([5.0, 5.1], "tokens/s"),
    }  # fmt: skip
    return result(
        model, fingerprint, "bench", data={"source": "transformers, batch 1", "sha256": "3" * 64, "rows": len(latency)},
        settings=settings, figures=figures, per_item={"latency": latency, "prefill": half},
    )  # fmt: skip


def samples(model: str, fingerprint: str, text: str) -> Result:
    """One continuation."""
    return result(model, fingerprint, "samples", settings={"prompt": "Once", "seed": 1}, per_item={"texts": [text]})


def checkpoint(folder: Path, *, stage: str = "prune", source: str = "org/tiny") -> Path:
    """What pruning or retraining leaves beside weights that are gone."""
    folder.mkdir(parents=True)
    steps: list[dict[str, Any]] = [
        {
            "stage": "prune", "source": source, "fingerprint": DENSE, "removed_blocks": [1], "protected_blocks": [0, 3],
            "criterion": "ppl", "before": plan().before, "after": plan().after, "versions": {"torch": "2"},
        }
    ]  # fmt: skip
    if stage == "retrain":
        steps.append(
            {
                "stage": "retrain", "method": "lora", "source": str(folder.parent / "pruned"), "fingerprint": PRUNED,
                "data": {"source": "rows.json"}, "steps": 2, "tokens": 400, "seed": 42,
            }
        )  # fmt: skip
        lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5, "validation": 2.6}]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        models = {"before": {"parameters": 900, "figures": {"validation": 3.1}}}
        (folder / "retraining.json").write_text(json.dumps({"models": models}))
    record = {
        "schema": 1, "source": source, "source_fingerprint": DENSE, "original_depth": 4, "kept_blocks": [0, 2, 3],
        "steps": steps, "files": {},
    }  # fmt: skip
    (folder / "shortstack.json").write_text(json.dumps(record))
    return folder


def folder_of_all(folder: Path, dense: str = "org/tiny", suffix: str = "") -> Path:
    """A folder with everything that a report shows."""
    folder.mkdir(parents=True, exist_ok=True)
    scores(source=dense).save(folder / "scores.json")
    (folder / "plan.json").write_text(json_text(plan(source=dense).to_json()))
    models = {DENSE: dense, PRUNED: f"{folder}/pruned{suffix}", RETRAINED: f"{folder}/retrained{suffix}"}
    save(folder / "ppl.json", *(ppl(name, key) for key, name in models.items()))
    right = {DENSE: [1, 1, 0, 1, 1, 0], PRUNED: [1, 0, 1, 0, 1, 1], RETRAINED: [1, 1, 0, 1, 1, 0]}
    save(folder / "zeroshot.json", *(zeroshot(name, key, right[key]) for key, name in models.items()))
    times = {DENSE: [1.0, 1.02, 0.99], PRUNED: [0.8, 0.81, 0.79], RETRAINED: [0.8, 0.82, 0.79]}
    save(folder / "bench.json", *(bench(name, key, times[key]) for key, name in models.items()))
    save(folder / "samples.json", *(samples(name, key, f"upon <b>{key[0]}</b> /a/b/c") for key, name in models.items()))
    checkpoint(folder / f"pruned{suffix}", source=dense)
    checkpoint(folder / f"retrained{suffix}", stage="retrain", source=dense)
    return folder


def save(path: Path, *results: Result) -> Path:
    """Write results.json."""
    Results(results).save(path)
    return path
