"""What is known of model families: exact or refused, and why; with what the test matrix has measured."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from shortstack.checkpoint.anatomy import Family
from shortstack.common.assets import ASSETS
from shortstack.common.formatting import table, wrapped
from shortstack.common.options import stage
from shortstack.common.shown import Shown
from shortstack.errors import ShortstackError, did_you_mean
from shortstack.families.table import FAMILIES

MEASURED = ASSETS / "families.json"
Status = Literal["exact", "partly", "refused"]
_STATUS = {"exact but for some sets": "partly"}
_SCORED = {"one block at a time": "by block", "whole model": "whole"}
ENOUGH = 3  # sets of blocks that must be exact for a family to count as such


@dataclass(frozen=True)
class FamilyFacts:
    """One family, as users ask about it.

    Attributes:
        family: the `model_type`.
        kind: `causal` for a decoder-only causal language model, `other` for what can be run as one.
        status: `exact`, `exact but for some sets`, or `refused`.
        exact_sets: sets of blocks whose removal the test matrix has found exact, over all tiny configurations.
        refused_sets: sets that it has found refused.
        scored: `one block at a time` or `whole model`.
        reason: why sets are refused, or the whole family; why the whole model is held for scoring.
    """

    family: str
    kind: Literal["causal", "other"]
    status: str
    exact_sets: int
    refused_sets: int
    scored: str
    reason: str


@dataclass(frozen=True, repr=False)
class FamiliesResult(Shown):
    """All families that are known."""

    families: tuple[FamilyFacts, ...]
    measured_with: dict[str, str]
    is_whole: bool = True

    def counted(self, kind: str) -> int:
        """Families of a kind that are exact with enough sets of blocks."""
        return sum(facts.kind == kind and facts.exact_sets >= ENOUGH for facts in self.families)

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "schema": 1,
            "causal_exact": self.counted("causal"),
            "other_exact": self.counted("other"),
            "measured_with": self.measured_with,
            "families": [asdict(facts) for facts in self.families],
        }

    def table_rows(self) -> list[dict[str, Any]]:
        """A row per family."""
        return [asdict(facts) for facts in self.families]

    def to_text(self) -> str:
        """A table and what it adds up to; of one family all that is known."""
        if len(self.families) == 1:
            facts = asdict(self.families[0])
            return wrapped((name.replace("_", " "), str(value)) for name, value in facts.items() if value)
        rows = [
            [facts.family, facts.kind, _STATUS.get(facts.status, facts.status), str(facts.exact_sets or "-"),
             _SCORED.get(facts.scored, facts.scored)]
            for facts in self.families
        ]  # fmt: skip
        lines = [table(["family", "kind", "shortened", "sets exact", "scored"], rows), ""]
        refused = sum(facts.status == "refused" for facts in self.families)
        if self.is_whole:
            lines.append(
                f"{self.counted('causal')} decoder-only causal language models are exact with {ENOUGH} or more sets\n"
                f"of blocks each, {self.counted('other')} others can be run as one; {refused} are refused."
            )
        else:
            lines.append(f"{len(self.families)} families, of which {refused} are refused")
        versions = ", ".join(f"{name} {version}" for name, version in self.measured_with.items())
        return "\n".join(
            [
                *lines,
                f"Measured on tiny models with {versions}.",
                "Any other family is probed with a tiny model, and refused unless it is exact.",
                "shortstack families NAME: why sets are refused, or a family is scored whole.",
            ]
        )


@stage
def families(name: str | None = None, *, status: Status | None = None) -> FamiliesResult:
    """Show which model families can be shortened exactly, which are refused, and why.

    Args:
        name: Show this family, or all whose name contains this text. By default all families are shown.
        status: Show only the families that are `exact`, `partly` (exact except for some sets of blocks) or `refused`.

    Returns:
        A row per family, with the number of sets of blocks that the test matrix has found exact.

    Raises:
        ShortstackError: no family is called so.
    """
    measured = measured_sets()
    chosen = sorted(FAMILIES)
    if name is not None:
        chosen = [name] if name in FAMILIES else [one for one in chosen if name.lower() in one]
        if not chosen:
            raise ShortstackError(
                f"{name}: not in the table of families; such a model is probed when it is opened",
                hint=did_you_mean(name, FAMILIES),
            )
    facts = tuple(_facts(FAMILIES[one], measured["configurations"]) for one in chosen)
    if status is not None:
        facts = tuple(one for one in facts if _STATUS.get(one.status, one.status) == status)
    return FamiliesResult(facts, measured["versions"], is_whole=name is None and status is None)


@functools.cache
def measured_sets() -> dict[str, Any]:
    """What the test matrix has found, as `scripts/prove_families.py` wrote it and the tests compare it."""
    found: dict[str, Any] = json.loads(MEASURED.read_text(encoding="utf-8"))
    return found


def _documented(row: Family) -> str:
    """What the rule itself says, where no set of the matrix meets it."""
    said = (row.refusal.__doc__ or "") if row.refusal is not None else ""
    return said.strip().partition(".\n")[0].rstrip(".")


def _facts(row: Family, configurations: dict[str, Any]) -> FamilyFacts:
    mine = [found for name, found in configurations.items() if name.partition("@")[0] == row.model_type]
    exact = sum(len(found["exact"]) for found in mine)
    refused = {blocks: reason for found in mine for blocks, reason in found["refused"].items()}
    if row.refused:
        status, reason = "refused", row.refused
    else:
        status = "exact but for some sets" if row.refusal is not None else "exact"
        reason = next(iter(refused.values()), "") or _documented(row)
    scored = "-" if row.refused else "whole model" if row.resident else "one block at a time"
    why = "; ".join(part for part in (reason, f"scored whole: {row.resident}" if row.resident else "") if part)
    return FamilyFacts(
        row.model_type, "causal" if row.causal else "other", status, exact, len(refused), scored, why
    )  # fmt: skip
