"""The commands that do it all again: those that a run recorded, else what the records say was done."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from shortstack.artifacts.results import Result
from shortstack.artifacts.score_command import score_command
from shortstack.common.json_fields import nested
from shortstack.publishing.report.material import Material
from shortstack.publishing.report.names import shared, shown

# Kind of evaluation -> its settings that are options of the command, by name.
_SETTINGS = {
    "ppl": ("limit",),
    "zeroshot": ("num_fewshot", "limit"),
    "generation": ("new_tokens", "seed"),
    "samples": ("prompt", "count", "new_tokens", "top_k", "top_p", "temperature", "seed"),
}
_BENCH = ("prompt_tokens", "sampling", "seed", "runs", "warmup")


def commands(material: Material, results: Sequence[Result]) -> list[str]:
    """What to type, in order."""
    recorded = _recorded(material.run)
    if recorded:
        return recorded
    found = [
        score_command(
            shown(scores.source),
            {**scores.calibration, "source": shown(str(scores.calibration.get("source", "")))}
            if scores.calibration
            else {},
            list(scores.criteria),
        )
        for scores in material.scores
    ]
    plan = material.plan
    if plan is not None and plan.removed:
        blocks = ",".join(map(str, plan.removed))
        found.append(f"shortstack prune {_word(plan.source)} --blocks {blocks} --verify --out PRUNED")
    found += _retraining(material)
    models = list(dict.fromkeys(one.model for one in results))
    named = " ".join(_model(one, material) for one in models)
    for what in dict.fromkeys(one.what for one in results):
        own = [one for one in results if one.what == what]
        found += _measured(what, own, named)
    return [shared(line) for line in found if line]


def _recorded(run: Mapping[str, Any]) -> list[str]:
    """The recipe, and each of its steps as a command."""
    if not run:
        return []
    model = _word(str(run.get("model", "MODEL")))
    lines = [f"shortstack run {_word(str(run.get('recipe')))} --model {model} --out RUN"]
    steps = [nested(run, "steps", name, "command") for name in run.get("order", [])]
    if any(steps):
        lines += ["", "# or step by step:", *(str(step) for step in steps if step)]
    return [shared(line) for line in lines]


def _retraining(material: Material) -> list[str]:
    found = []
    for history in material.histories:
        steps = history.record["steps"]
        if (
            not steps
            or steps[-1].get("stage") != "retrain"
            or steps[-1].get("method") not in ("lora", "cpt", "distill", "local")
        ):
            continue
        step = steps[-1]
        method, data = step["method"], _word(str(nested(step, "data", "source") or "DATA"))
        dense = {"distill": "--teacher", "local": "--of"}.get(method)
        teacher = f" {dense} {_word(str(history.record.get('source')))}" if dense else ""
        amount = ("--tokens", step.get("tokens")) if method == "local" else ("--max-steps", step.get("steps"))
        steps_done = f" {amount[0]} {amount[1]}" if isinstance(amount[1], int) else ""
        seed = f" --seed {step['seed']}" if isinstance(step.get("seed"), int) else ""
        source = _word(str(step.get("source", "PRUNED")))
        found.append(
            f"shortstack retrain {method} {source} --data {data}{teacher}{steps_done}{seed} "
            f"--out {_word(history.name)}  # its other options: hyperparameters in {history.name}/shortstack.json"
        )
    return found


def _measured(what: str, results: Sequence[Result], models: str) -> list[str]:
    settings = results[0].settings
    if what == "bench":
        timed = [one for one in results if "batch" in one.settings]
        if not timed:
            return []
        settings = timed[0].settings
        both = {
            name: ",".join(map(str, dict.fromkeys(one.settings[name] for one in timed)))
            for name in ("batch", "new_tokens")
        }
        options = _options({**both, **{name: settings.get(name) for name in _BENCH}})
        compare = " --compare" if len({one.model for one in timed}) > 1 else ""
        return [f"shortstack bench {models}{options} --engine {_word(settings['engine'])}{compare} --out bench.json"]
    if what not in _SETTINGS:
        return []
    options = _options({name: settings.get(name) for name in _SETTINGS[what]})
    if what == "ppl":
        sources = ",".join(dict.fromkeys(str(one.data.get("source", "DATA")) for one in results))
        lengths = settings.get("seq_len")
        listed = ",".join(map(str, lengths)) if isinstance(lengths, list) else str(lengths or 128)
        rules = {name.endswith("_bos_every") for one in results for name in one.figures}
        bos = " --bos both" if len(rules) > 1 else " --bos every" if True in rules else ""
        options = f" --data {_word(sources)} --seq-len {listed}{bos}{options}"
    if what == "zeroshot" and isinstance(results[0].data.get("tasks"), dict):
        options = f" --tasks {_word(','.join(results[0].data['tasks']))}{options}"
    return [f"shortstack eval {what} {models}{options} --out {what}.json"]


def _options(values: Mapping[str, Any]) -> str:
    given = {name: value for name, value in values.items() if value is not None}
    return "".join(f" --{name.replace('_', '-')} {_word(value)}" for name, value in given.items())


def _model(label: str, material: Material) -> str:
    """A model's name in a command: of the dense one its source."""
    plan = material.plan
    return _word(plan.source) if label == "dense" and plan is not None else _word(label)


def _word(value: Any) -> str:
    return shlex.quote(shown(str(value)))
