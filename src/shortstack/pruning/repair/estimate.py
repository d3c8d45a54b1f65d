"""What a repair will leave and compute, told before it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shortstack.checkpoint.forecast import Estimate, Forecast, Passes
from shortstack.pruning.repair.options import VALIDATION_SHARE, WINDOWS

_MODELS = 2  # through which all windows go
_HEADS = 6  # dense model, no repair, and at one cut a quarter of seven candidates and the rest of three, at least


def estimate_repair(values: Mapping[str, Any]) -> Estimate:
    """The checkpoint that a repair makes."""
    model: Forecast | None = values.get("model")
    if model is None:
        return Estimate("checkpoint")
    passes = (repair_passes(model, values),)
    return Estimate("a checkpoint of the same size", model.nbytes, forecast=model, passes=passes, fastest=True)


def repair_passes(pruned: Forecast, values: Mapping[str, Any]) -> Passes:
    """What repairing one cut of a pruned model computes at least: where its cuts are is not known beforehand."""
    fitted = values.get("samples", WINDOWS.samples) * values.get("seq_len", WINDOWS.seq_len)
    validated = fitted / VALIDATION_SHARE
    return Passes(pruned, _MODELS * (fitted + validated) * len(pruned.kept), _HEADS * validated)
