"""What a scoring run computes, told before it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shortstack.checkpoint.forecast import Estimate, Forecast, Passes
from shortstack.common.formatting import parse_blocks
from shortstack.data.named_sources import calibration_tokens
from shortstack.scoring.criteria import RequestedCriterion, parse_criteria


def block_passes(depth: int, criteria: Sequence[RequestedCriterion], candidates: Sequence[int] | None = None) -> int:
    """How often every token of the calibration set goes through a block, a gradient counted as three times.

    Args:
        depth: blocks of the model.
        criteria: what is computed in the same sweep.
        candidates: positions of the blocks that are scored; all by default.
    """
    needs = frozenset[str]().union(*(asked.needs for asked in criteria))
    passes = depth + (3 * depth if "gradients" in needs else 0)
    if needs & {"branches", "logits"}:
        passes += sum(depth - 1 - index for index in (range(depth) if candidates is None else candidates))
    return passes


def estimate_score(values: Mapping[str, Any]) -> Estimate:
    """The scores, by criterion; they take no room."""
    criteria = parse_criteria(values.get("criterion", "ppl"))
    names, model = tuple(one.name for one in criteria), values.get("model")
    if not any(one.needs_windows for one in criteria):
        return Estimate("scores", criteria=names, untimed="reads the weights")
    if not isinstance(model, Forecast):
        return Estimate("scores", criteria=names)
    depth = len(model.kept)
    scored = len(set(parse_blocks(values["blocks"]))) if values.get("blocks") else depth
    # Which blocks are scored decides how many are run without them: of some of them the last, which are the fewest.
    candidates = range(max(0, depth - scored), depth)
    tokens = calibration_tokens(values)
    needs = frozenset[str]().union(*(one.needs for one in criteria))
    heads = 1 + (3 if "gradients" in needs else 0) + (scored if needs & {"branches", "logits"} else 0)
    passes = Passes(model, tokens * block_passes(depth, criteria, candidates), tokens * heads)
    return Estimate("scores", criteria=names, passes=(passes,), fastest=True)
