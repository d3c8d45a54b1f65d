"""Whether all that was found is about one model that was shortened in one way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shortstack.artifacts.plan import PrunePlan
from shortstack.common.formatting import ranges
from shortstack.errors import ShortstackError
from shortstack.publishing.report.material import History, Material


def one_plan(material: Material, plans: Sequence[PrunePlan]) -> PrunePlan | None:
    """The plan that the report is about; of a checkpoint's history where there is no plan.json.

    Of a model that was shortened more than once it is the one that leaves the fewest blocks.

    Raises:
        ShortstackError: two of them keep different blocks, none all that the other one keeps.
    """
    made = [plan for history in material.histories if (plan := _plan_of(history)) is not None]
    sources = {one.record.get("source_fingerprint") for one in material.histories}
    found = [*plans, *made]
    first = [plan for plan in found if plan.fingerprint in sources] or found
    if not first:
        return None
    least = min(first, key=lambda plan: len(plan.kept))
    for other in first:
        if other.fingerprint == least.fingerprint and not set(least.kept) <= set(other.kept):
            raise ShortstackError(
                f"two ways to shorten {least.source} are among these files: one removes blocks {ranges(least.removed)}, "
                f"the other {ranges(other.removed)}",
                hint="a report is about one of them: make a report for each",
            )
    return least


def _plan_of(history: History) -> PrunePlan | None:
    record = history.record
    steps = [step for step in record["steps"] if step.get("stage") == "prune"]
    if not steps:
        return None
    kept, first, last = set(record["kept_blocks"]), steps[0], steps[-1]
    blocks = tuple(range(record["original_depth"]))
    removed = tuple(index for index in blocks if index not in kept)
    protected = last.get("protected_blocks") or []
    return PrunePlan(
        source=str(record.get("source", history.name)),
        fingerprint=str(record.get("source_fingerprint", "")),
        blocks=blocks,
        removed=removed,
        protected=tuple(index for index in protected if index in kept),
        criterion=", then ".join(dict.fromkeys(str(step.get("criterion", "given")) for step in steps)),
        before=_sizes(first.get("before")),
        after=_sizes(last.get("after")),
        why=last["why"] if isinstance(last.get("why"), dict) else {},
    )


def _sizes(record: Any) -> dict[str, int | None]:
    return {key: value for key, value in record.items() if type(value) is int} if isinstance(record, dict) else {}


def check_one_model(material: Material) -> None:
    """Refuse scores, plan and checkpoints of different models.

    Raises:
        ShortstackError: two of them are of models that have nothing to do with one another, as far as records say.
    """
    known = [({one.fingerprint}, "the scores", one.source) for one in material.scores if one.fingerprint is not None]
    known += [({material.plan.fingerprint}, "the plan", material.plan.source)] if material.plan is not None else []
    known += [
        (one.fingerprints, f"the checkpoint {one.name}", str(one.record.get("source"))) for one in material.histories
    ]
    if not known:
        return
    first, *others = known
    related = set(first[0])
    for _ in others:  # what is related by way of a later one is related, too
        related |= {name for one in others if one[0] & related for name in one[0]}
    for fingerprints, what, source in others:
        if not fingerprints & related:
            raise ShortstackError(
                f"{first[1]} (of {first[2]}) and {what} (of {source}) are about different models: their fingerprints differ",
                hint="a report is about one model: make a report for each",
            )
