"""Published figures in the package, by name, so that a user can set their own beside them."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Any

from shortstack.common.assets import ASSETS
from shortstack.errors import UsageError, did_you_mean

_FILE = ASSETS / "published_results.json"


@dataclass(frozen=True)
class PublishedResult:
    """The published figures of one model.

    Attributes:
        name: The name that it was published under.
        parameters: The number of parameters of the model.
        figures: The value of each figure, by the kind of evaluation, the text or task, and the name of the figure.
            Accuracies are from 0 to 1.
        note: How the figures were measured.
    """

    name: str
    parameters: int
    figures: dict[tuple[str, str, str], float]
    note: str


def published_result(name: str) -> PublishedResult:
    """The published figures of a model, such as `st-vicuna-v1.3-5.5b-ppl` or `vicuna-7b-v1.3`.

    Raises:
        UsageError: nothing was published under this name.
    """
    records = _records()
    known = records["models"]
    if name not in known:
        raise UsageError(f"--published {name}: no such published model", hint=did_you_mean(name, known))
    record = known[name]
    figures = {}
    for policy, figure in (("ppl_bos_first", "ppl_128"), ("ppl_bos_every", "ppl_128_bos_every")):
        for text, value in record.get(policy, {}).items():
            figures["ppl", text, figure] = float(value)
    for task, found in record.get("zeroshot", {}).items():
        label = task if task == "AVE" else f"{task} {found['metric']}"
        figures["zeroshot", "", label] = float(found["percent"]) / 100
    return PublishedResult(name, int(record["params"]), figures, str(records["meta"]["note"]))


def published_names() -> list[str]:
    """All models with published figures."""
    return list(_records()["models"])


@functools.cache
def _records() -> dict[str, Any]:
    records: dict[str, Any] = json.loads(_FILE.read_bytes())
    return records
