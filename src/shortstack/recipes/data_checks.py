"""Texts, tasks and options of a step, looked at before anything runs: what can be read here is opened."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shortstack.baselines.figures import published_result
from shortstack.checkpoint.hub import unreachable_hub
from shortstack.data.hub_datasets import NAMED_SETS, hub_files, hub_set_id
from shortstack.data.instructions import kind_of
from shortstack.data.ppl_datasets import LOCAL_COPIES, evaluation_texts
from shortstack.data.sources import read_corpus
from shortstack.errors import ShortstackError, UsageError
from shortstack.evaluation.ppl import parse_lengths
from shortstack.evaluation.task_files import TASKS, local_rows
from shortstack.recipes.resolve import Step
from shortstack.runtime.devices import pick_device
from shortstack.scoring.criteria import parse_criteria

_READ = 64 << 10  # bytes of a text that are enough to see what it is


def check_data(step: Step) -> list[str]:
    """Look at what a step reads besides models, and at options that mean something only to it.

    Returns:
        What could not be looked at, in lines.

    Raises:
        ShortstackError: it would fail on it.
    """
    if str(step.values.get("device", "")).startswith("cuda"):
        pick_device(step.values["device"])
    check = _CHECKS.get(step.stage.verb)
    return check(step.values) if check is not None else []


def needs_text(values: dict[str, Any]) -> bool:
    """Whether a scoring step runs windows.

    Raises:
        UsageError: an unknown criterion.
    """
    return any(criterion.needs != "weights" for criterion in parse_criteria(values.get("criterion", "ppl")))


def _score(values: dict[str, Any]) -> list[str]:
    if not needs_text(values):
        return []
    data = values.get("data", "embedded")
    return _looked_at(data, "calibration", lambda: read_corpus(data, role="calibration", limit_bytes=_READ))


def _retrain(values: dict[str, Any]) -> list[str]:
    notes = []
    if data := values.get("data"):
        notes += _looked_at(data, "training", functools.partial(kind_of, data))
    for text in filter(None, (values.get("eval_data") or "").split(",")):
        look = functools.partial(read_corpus, text, role="evaluation", limit_bytes=_READ)
        notes += _looked_at(text, "evaluation", look)
    return notes


def _ppl(values: dict[str, Any]) -> list[str]:
    parse_lengths(values.get("seq_len"))
    notes = []
    folder = Path(values["data_dir"]) if values.get("data_dir") else None
    for text in values.get("data", "embedded").split(","):
        look = functools.partial(evaluation_texts, text, folder)
        if folder is not None and text in LOCAL_COPIES:
            look()
        else:
            notes += _looked_at(text, "evaluation", look)
    return notes


def _zeroshot(values: dict[str, Any]) -> list[str]:
    folder = values.get("tasks_dir")
    names = values["tasks"].split(",") if values.get("tasks") else list(TASKS)
    if folder is None:
        return [f"the rows of {', '.join(names)} come from the hub when they are needed"]
    if not Path(folder).is_dir():
        raise UsageError(f"tasks_dir {folder}: no such folder")
    for name in names:
        if name in TASKS:
            local_rows(name, Path(folder))
    return []


def _all(values: dict[str, Any]) -> list[str]:
    return [*_ppl({"data": "wikitext2,ptb", **values}), *_zeroshot(values)]


def _compare(values: dict[str, Any]) -> list[str]:
    for name in (values.get("published") or "").split(","):
        if name:
            published_result(name.strip())
    return []


_CHECKS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "score": _score,
    "retrain lora": _retrain,
    "retrain cpt": _retrain,
    "retrain distill": _retrain,
    "teach": _retrain,
    "eval ppl": _ppl,
    "eval zeroshot": _zeroshot,
    "eval all": _all,
    "compare": _compare,
}


def _looked_at(source: str, role: Any, look: Callable[[], object]) -> list[str]:
    """Lines about a text on the hub; one on this disk is opened.

    Raises:
        ShortstackError: what opening it, or the hub, says.
    """
    notes = _on_hub(source, role)
    if not notes:
        look()
    return notes


def _on_hub(source: str, role: Any) -> list[str]:
    """Lines about a set on the hub; empty for what is on this disk.

    Raises:
        ShortstackError: the hub answers, and has no such set.
    """
    if source == "embedded" or Path(source).expanduser().exists():
        return []
    if source not in NAMED_SETS:
        hub_set_id(source)
    try:
        hub_files(source, role=role)
    except ShortstackError as error:
        if _is_out_of_reach():
            return [f"{source} was not looked at: {error.message.removeprefix(source + ': ')}"]
        raise
    return [f"{source} comes from the hub when it is needed"]


def _is_out_of_reach() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE) or unreachable_hub() is not None
