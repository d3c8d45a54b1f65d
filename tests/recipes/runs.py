"""A small recipe, and runs of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shortstack.recipes.run import RunResult, run

RECIPE = """\
about: small, whole
model: {model}
steps:
  score: {{criterion: "ppl,magnitude", data: {text}, samples: 4, seq_len: 16, csv: csv}}
  prune: {{scores: $score, criterion: ppl, remove: 2, verify: true}}
  cpt:
    stage: retrain cpt
    data: {text}
    seq_len: 16
    batch: 2
    micro_batch: 1
    max_steps: 4
    save_every: 1
    validation: 2
  ppl: {{stage: eval ppl, data: {text}, seq_len: 16}}
  check: {{model: $cpt}}
  compare: {{results: [$ppl]}}
"""
STEPS = ["score", "prune", "cpt", "ppl", "check", "compare"]


def done(recipe: Path | str, out: Path, **options: Any) -> RunResult:
    found = run(str(recipe), out=out, quiet=True, **options)
    assert isinstance(found, RunResult)
    return found


def states(result: RunResult) -> dict[str, str]:
    return {step.name: step.state for step in result.steps}
