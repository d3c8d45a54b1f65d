"""What a repair will leave and compute, told before it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shortstack.checkpoint.forecast import Estimate, Forecast, Passes
from shortstack.pruning.repair.options import SCREENED, TRIED, VALIDATION_SHARE, WINDOWS, RepairOptions

_MODELS = 2  # through which all windows go
_METHODS = 3  # of `auto`


def estimate_repair(values: Mapping[str, Any]) -> Estimate:
    """The checkpoint that a repair makes."""
    model: Forecast | None = values.get("model")
    if model is None:
        return Estimate("checkpoint")
    passes = (repair_passes(model, values, values.get("method", "auto")),)
    return Estimate("a checkpoint of the same size", model.nbytes, forecast=model, passes=passes, fastest=True)


def repair_passes(pruned: Forecast, values: Mapping[str, Any], method: Any) -> Passes:
    """What repairing the cuts of a pruned model computes at least: those that are known, or one behind all blocks."""
    depth = len(pruned.kept)
    fitted = values.get("samples", WINDOWS.samples) * values.get("seq_len", WINDOWS.seq_len)
    validated = fitted / VALIDATION_SHARE
    fits = 2 if values.get("first_token") is None else 1
    behind = RepairOptions(behind=values.get("behind")).behind_with(method)
    at_cut, at_block = _to_the_end(_METHODS if method == "auto" else 1, fits), _to_the_end(1, fits)
    cuts = _cuts(pruned) or [depth]
    # (times that the validation windows are run, through how many blocks) of each place
    runs = [(at_cut, depth - cut) for cut in cuts]
    runs += [(at_block, depth - cut - number - 1) for cut in cuts for number in range(behind) if cut + number < depth]
    blocks = _MODELS * (fitted + validated) * depth + validated * sum(times * left for times, left in runs)
    return Passes(pruned, blocks, validated * (2 + sum(times for times, _ in runs)))


def _to_the_end(methods: int, fits: int) -> float:
    """How often the validation windows go to the end of the model at a place."""
    return methods * (fits * TRIED / SCREENED + 1 - 1 / SCREENED)


def _cuts(pruned: Forecast) -> list[int]:
    """Places of the blocks that come right behind a cut."""
    blocks = [pruned.checkpoint.original_blocks[position] for position in pruned.kept]
    return [place for place in range(1, len(blocks)) if blocks[place] != blocks[place - 1] + 1]
