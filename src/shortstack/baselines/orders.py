"""Published block orders in the package: `published:[MODEL:]CRITERION` stands wherever a scores file does."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from shortstack.artifacts.scores import CriterionScores, Scores, load_scores
from shortstack.checkpoint.hub import parse_hub_id
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.assets import ASSETS
from shortstack.errors import UsageError, did_you_mean

PREFIX = "published:"
_FILE = ASSETS / "published_orders.json"


def open_scores(source: str | Path, checkpoint: Checkpoint | None = None, *, model: str | None = None) -> Scores:
    """Scores from a file, or published ones by name.

    Args:
        source: a scores.json, a block_order.csv, or `published:[MODEL:]CRITERION`; MODEL is the published name
            (`vicuna-7b-v1.3`) or the hub id.
        checkpoint: says which model is meant where the name does not: by its hub id, or by its history.
        model: the same, where there is no checkpoint.

    Raises:
        ShortstackError: no such file, or nothing was published under this name.
    """
    text = str(source)
    if not text.startswith(PREFIX):
        return load_scores(source)
    name, colon, criterion = text.removeprefix(PREFIX).rpartition(":")
    if not colon:
        sources = [model] if checkpoint is None else [checkpoint.source, (checkpoint.provenance or {}).get("source")]
        name = next((known for one in sources if one and (known := _name_of(str(one)))), "")
        if not name:
            which = sources[0] or "nothing"
            raise UsageError(
                f"{text}: {which} does not record which published model it is",
                hint=f"{PREFIX}MODEL:{criterion}, MODEL one of {', '.join(published_models())}",
            )
    return _published(text, name, criterion)


def published_models() -> dict[str, dict[str, Any]]:
    """Published name -> hub id, number of blocks, parameters, those left after pruning, orders and scores by criterion."""
    models: dict[str, dict[str, Any]] = _records()["models"]
    return models


def _published(text: str, name: str, criterion: str) -> Scores:
    known = _name_of(name)
    if known is None:
        hint = did_you_mean(name, published_models())
        raise UsageError(f"{text}: there is no published order of a model {name!r}", hint=hint)
    record = published_models()[known]
    if criterion not in record["criteria"]:
        hint = did_you_mean(criterion, record["criteria"])
        raise UsageError(f"{text}: no order of {known} by {criterion!r} was published", hint=hint)
    entry = record["criteria"][criterion]
    found = CriterionScores(
        criterion,
        tuple(float(score) for score in entry["scores"]),  # "inf" where a model without the block says nothing any more
        tuple(range(record["blocks"])),
        known_order=tuple(entry["order"]),
    )
    calibration = {"source": "bookcorpus", "samples": 10, "seq_len": 128, "seed": 1234, "sampling": "published",
                   "bos_every": record["bos_every"], "published": _records()["meta"]["source"]}  # fmt: skip
    return Scores(f"{PREFIX}{known}:{criterion}", None, found.blocks, {criterion: found}, calibration)


def _name_of(model: str) -> str | None:
    """The published name of a model, from that name or from its hub id."""
    parsed = parse_hub_id(model)
    asked = (parsed[0] if parsed else model).lower()
    return next(
        (name for name, one in published_models().items() if asked in (name.lower(), one["hub_id"].lower())), None
    )


@functools.cache
def _records() -> dict[str, Any]:
    records: dict[str, Any] = json.loads(_FILE.read_bytes())
    return records
