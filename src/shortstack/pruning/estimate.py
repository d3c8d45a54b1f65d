"""What planning and pruning will leave, told before scores are there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shortstack.artifacts.plan import PrunePlan, load_plan
from shortstack.artifacts.protected import protected_blocks
from shortstack.artifacts.scores import CriterionScores, Scores
from shortstack.checkpoint.forecast import COPIES, Estimate, Forecast, Passes
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.formatting import count
from shortstack.data.named_sources import calibration_tokens
from shortstack.pruning.budget import Sizes, amount_to_remove, is_of_measurements
from shortstack.pruning.options import BlockChoice, CurveOptions, SearchOptions
from shortstack.pruning.plan import plan_for
from shortstack.pruning.repair.estimate import repair_passes
from shortstack.pruning.selection import parse_selection


def estimate_plan(values: Mapping[str, Any]) -> Estimate:
    """What a plan leaves; it takes no room itself."""
    forecast = _cut(values)
    return Estimate("plan" if forecast is None else _described(forecast), forecast=forecast, untimed=COPIES)


def estimate_prune(values: Mapping[str, Any]) -> Estimate:
    """The checkpoint that pruning makes."""
    searches, repairs = values.get("selection") is not None, values.get("repair") is not None
    searched = estimate_search(values) if searches else Estimate("")
    forecast = searched.forecast if searches else _cut(values)
    if forecast is None:
        return Estimate("checkpoint")
    passes = (*searched.passes, *((repair_passes(forecast, values, values["repair"]),) if repairs else ()))
    untimed = "" if searches or repairs else COPIES
    return Estimate(
        _described(forecast), forecast.nbytes, forecast=forecast, passes=passes, untimed=untimed, fastest=True
    )


def estimate_search(values: Mapping[str, Any]) -> Estimate:
    """What a search leaves: how many blocks is known, which of them is not."""
    model: Forecast | None = values.get("model")
    if model is None:
        return Estimate("plan")
    names = {field.name for field in dataclasses.fields(SearchOptions)}
    choice = SearchOptions(**{name: value for name, value in values.items() if name in names})
    if is_of_measurements(choice):
        return Estimate("plan")
    wanted = amount_to_remove(_sizes(model), choice)
    forecast = _without(model, wanted)
    kind = parse_selection(choice.selection).kind
    steps = wanted if kind in ("greedy", "beam") else 1
    passes = (_of_steps(model, steps, choice.plus, values),)
    return Estimate(_described(forecast), forecast=forecast, passes=passes, fastest=kind != "gate")


def estimate_curve(values: Mapping[str, Any]) -> Estimate:
    """A curve; it takes no room."""
    model: Forecast | None = values.get("model")
    if model is None:
        return Estimate("curve")
    selection = parse_selection(values.get("selection", CurveOptions().selection))
    most = values.get("most") or max(1, len(_free(model, values.get("plus"))) // 2)
    steps = most if selection.kind in ("greedy", "beam") else 1
    passes = (_of_steps(model, steps, values.get("plus"), values),)
    return Estimate(f"{most} points", passes=passes, fastest=selection.kind != "gate")


def _of_steps(model: Forecast, steps: int, plus: bool | None, values: Mapping[str, Any]) -> Passes:
    """At least what a greedy search computes on the windows that choose: every removable block, at each step."""
    depth, free = len(model.kept), _free(model, plus)
    tokens = calibration_tokens(values)
    blocks = heads = 0
    for gone in range(min(steps, len(free))):
        left = free[gone:]  # those that are run through the fewest blocks: it may be fewer than in truth, never more
        blocks += depth - gone + sum(max(0, depth - 1 - place - gone) for place in left)
        heads += 1 + len(left)
    return Passes(model, tokens * blocks, tokens * heads)


def _free(model: Forecast, plus: bool | None) -> list[int]:
    """Positions of the removable blocks."""
    kept = protected_blocks(model.checkpoint.original_blocks, plus)[0]
    blocks = [model.checkpoint.original_blocks[position] for position in model.kept]
    return [place for place, block in enumerate(blocks) if block not in kept]


def _described(forecast: Forecast) -> str:
    return f"{len(forecast.kept)} blocks, {count(forecast.parameters)} parameters"


def _cut(values: Mapping[str, Any]) -> Forecast | None:
    """What will be left of the model: which blocks, where that can be known now, else how many.

    Raises:
        ShortstackError: the choice cannot be carried out on the model.
    """
    model, plan = values.get("model"), values.get("plan")
    if isinstance(plan, Forecast) or model is None:
        return plan if isinstance(plan, Forecast) else None
    if isinstance(plan, str | Path):
        return _planned(model, load_plan(plan))
    fields = {field.name for field in dataclasses.fields(BlockChoice)}
    choice = BlockChoice(**{name: value for name, value in values.items() if name in fields})
    if is_of_measurements(choice):
        return None
    checkpoint = model.checkpoint
    is_whole = len(model.kept) == checkpoint.depth and model.narrower == (0, 0)
    scores: Any = choice.scores
    is_scored = not isinstance(scores, Estimate)  # else an earlier step of the recipe will make the scores
    criteria = () if is_scored else scores.criteria
    any_scores = _any_scores(checkpoint, criteria)
    if criteria:
        any_scores = dataclasses.replace(any_scores, criteria={"": any_scores.criterion(choice.criterion)})
    if is_whole and is_scored:
        return _planned(model, plan_for(checkpoint, choice).plan)
    if is_whole:
        # Which blocks are removed is not known before they are scored; that so many are removable is.
        plan_for(checkpoint, dataclasses.replace(choice, scores=any_scores, criterion=None))
    if choice.blocks is not None:
        return _without(model, len(choice.blocks.split(",")))
    return _without(model, amount_to_remove(_sizes(model), choice))


def _sizes(model: Forecast) -> Sizes:
    return Sizes(model.checkpoint.source, model.block_parameters(), model.block_bytes(), model.parameters, model.nbytes)


def _planned(model: Forecast, plan: PrunePlan) -> Forecast:
    return dataclasses.replace(model, kept=tuple(model.checkpoint.position_of(index) for index in plan.kept))


def _without(model: Forecast, blocks: int) -> Forecast:
    """With that many blocks less: the first removable ones."""
    protected = set(protected_blocks(range(len(model.kept)), None)[0])
    free = [position for number, position in enumerate(model.kept) if number not in protected]
    gone = set((free if blocks <= len(free) else list(model.kept))[:blocks])
    return dataclasses.replace(model, kept=tuple(position for position in model.kept if position not in gone))


def _any_scores(checkpoint: Checkpoint, criteria: Sequence[str]) -> Scores:
    """Scores as an earlier step will make them, as far as their criteria are known."""
    blocks = checkpoint.original_blocks
    if not criteria:
        return Scores(checkpoint.source, None, blocks, {"any": CriterionScores("any", (), blocks, known_order=blocks)})
    return Scores(
        checkpoint.source,
        None,
        blocks,
        {name: CriterionScores(name, (0.0,) * len(blocks), blocks) for name in criteria},
    )
