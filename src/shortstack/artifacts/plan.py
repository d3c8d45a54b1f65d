"""The record of a plan: the blocks to remove from one checkpoint, and why. It checks itself when it is made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shortstack.common import json_fields as records
from shortstack.common.formatting import count, ranges, size
from shortstack.common.json_text import read_json
from shortstack.common.keywords import said_in_python
from shortstack.common.shown import Shown
from shortstack.common.tables import Table
from shortstack.errors import ShortstackError, system_reason

SCHEMA = 1


@dataclass(frozen=True, repr=False)
class PrunePlan(Shown):
    """The blocks to remove from one checkpoint, and why. Blocks have their numbers in the original model.

    A plan checks itself: one with duplicate, unknown or protected blocks, or without a remaining block, is refused.

    Attributes:
        source: The checkpoint that the plan is for, as it was named in the call.
        fingerprint: The fingerprint of that checkpoint.
        blocks: All blocks of the checkpoint, in order.
        removed: The blocks to remove, ascending.
        protected: The blocks that must not be removed (the published "+" rule), ascending.
        criterion: The criterion or search that chose the blocks, or "given".
        before: The parameters, bytes and key-value cache bytes per token (in 16 bits) of the checkpoint.
        after: The same of the pruned checkpoint.
        why: Everything else behind the choice: the strategy, the calibration set, the scores.
        note: What a reader of the plan should know.
        gone: The blocks of the original model that were removed before, ascending.
    """

    source: str
    fingerprint: str
    blocks: tuple[int, ...]
    removed: tuple[int, ...]
    protected: tuple[int, ...] = ()
    criterion: str = "given"
    before: dict[str, int | None] = field(default_factory=dict)
    after: dict[str, int | None] = field(default_factory=dict)
    why: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    gone: tuple[int, ...] = ()

    @said_in_python
    def __post_init__(self) -> None:
        if len(set(self.removed)) != len(self.removed):
            twice = sorted({index for index in self.removed if self.removed.count(index) > 1})
            raise ShortstackError(f"{self.source}: {blocks_text(twice)} listed twice", hint="list each block once")
        again = sorted(set(self.removed) & set(self.gone))
        if again:
            raise ShortstackError(
                f"{self.source}: {blocks_text(again)} removed already; it has blocks {ranges(self.blocks)}",
                hint="blocks keep the numbers that they have in the original model",
            )
        unknown = sorted(set(self.removed) - set(self.blocks))
        if unknown:
            raise ShortstackError(
                f"{self.source}: no block {ranges(unknown)}; it has blocks {ranges(self.blocks)}",
                hint="blocks are numbered from 0, as in the original model",
            )
        guarded = sorted(set(self.removed) & set(self.protected))
        if guarded:
            raise ShortstackError(
                f"{self.source}: {blocks_text(guarded)} protected", hint="--no-plus switches the protection off"
            )
        if self.removed and len(self.removed) >= len(self.blocks):
            raise ShortstackError(
                f"{self.source}: removing {len(self.removed)} of {len(self.blocks)} blocks leaves none",
                hint="keep at least one block",
            )

    @property
    def kept(self) -> tuple[int, ...]:
        """The remaining blocks, ascending."""
        return tuple(index for index in self.blocks if index not in self.removed)

    @property
    def removal_ratio(self) -> float:
        """The share of the parameters that is removed, from 0 to 1."""
        before, after = self.before.get("parameters"), self.after.get("parameters")
        return 1 - after / before if before and after else 0.0

    def to_json(self) -> dict[str, Any]:
        """The JSON form (schema 1)."""
        return {
            "schema": SCHEMA,
            "model": {"source": self.source, "fingerprint": self.fingerprint, "blocks": list(self.blocks)},
            "removed": list(self.removed),
            "kept": list(self.kept),
            "protected": list(self.protected),
            "already_removed": list(self.gone),
            "criterion": self.criterion,
            "removal_ratio": self.removal_ratio,
            "before": self.before,
            "after": self.after,
            "why": self.why,
        }

    def table_rows(self) -> list[dict[str, Any]]:
        """One row for each block."""
        return [
            {"block": index, "removed": index in self.removed, "protected": index in self.protected}
            for index in self.blocks
        ]

    def to_text(self) -> str:
        """What a person reads on the terminal."""
        ratio = f"{self.removal_ratio:.1%} of parameters"
        lines = [
            f"{self.source}: {len(self.removed)} of {len(self.blocks)} blocks are removed ({ratio}), "
            + ("as given" if self.criterion == "given" else f"chosen by {self.criterion}"),
            f"  removed  {ranges(self.removed) or 'none'}",
            f"  kept     {ranges(self.kept)}",
        ]
        if self.protected:
            lines.append(f"  protected (+)  {ranges(self.protected)}")
        if self.gone:
            lines.append(f"  already removed  {ranges(self.gone)}, of the original model")
        lines += ["", self.sizes().to_text(), *self.costs_text()]
        return "\n".join([*lines, *([self.note] if self.note else [])])

    def costs_text(self) -> list[str]:
        """The cost for each named source, and the measured costs of the set and its alternatives, if known."""
        pays, measured = self.pays(), self.why.get("measured")
        lines = [] if pays is None else ["", pays.to_text()]
        return lines if measured is None else [*lines, "", *self._measured_text(measured)]

    def pays(self) -> Table | None:
        """The cost of the removal for each named source; None if the text has one source."""
        if "sources" in self.why:
            is_loss, added = self.why["sources"]["is_loss"], self.why["sources"]["added_up"]
            rows = [(source, _change(_ratio(value)) if is_loss else f"{value:.4g}") for source, value in added.items()]
            what = "perplexity" if is_loss else "score"
            return Table(["source", what], rows, f"cost for each source: {self._for()}costs of single blocks, added up")
        sets = self.why.get("measured", {}).get("sets", [])
        if not sets or not sets[0].get("sources"):
            return None
        rows = [
            (source, *(_change(one["sources"][source]["increase"], one["sources"][source]["stderr"]) for one in sets))
            for source in sets[0]["sources"]
        ]
        return Table(
            ["source", *(one["by"] for one in sets)],
            rows,
            f"increase of perplexity for each source{self._for(' (', ')')}",
        )

    def _for(self, before: str = "", after: str = "; ") -> str:
        objective = self.why.get("objective")
        return f"{before}the set is chosen for {objective}{after}" if objective else ""

    @staticmethod
    def _measured_text(measured: dict[str, Any]) -> list[str]:
        """What sets of blocks cost on windows that chose nothing: the chosen one first."""
        rows = [
            (one["by"], ranges(one["removed"]) or "none", _change(one["increase"], one["stderr"]))
            for one in measured["sets"]
        ]
        return [
            f"on validation windows, where the dense model has a perplexity of {measured['dense_ppl']:.4g}:",
            Table(["chosen by", "removed", "perplexity"], rows).to_text(),
            f"the costs of these blocks one by one add up to {_change(measured['added_up'])}",
        ]

    def sizes(self) -> Table:
        """Blocks, parameters, bytes and key-value cache, before and after."""
        rows = [("blocks", str(len(self.blocks)), str(len(self.kept)))]
        for key, name, show in (
            ("parameters", "parameters", count),
            ("bytes", "bytes", size),
            ("kv_bytes_per_token", "KV cache per token", size),
        ):
            before, after = self.before.get(key), self.after.get(key)
            if before is not None and after is not None:
                rows.append((name, show(before), show(after)))
        return Table(["", "before", "after"], rows)


def _ratio(added: float) -> float:
    """Added NLL as the share by which a perplexity grows."""
    return math.expm1(added) if added < 700 else math.inf


def _change(share: float, error: float | None = None) -> str:
    """`+14.2%`, with its error where one is known: `+14.2% ±1.9`."""
    return f"{share:+.1%}" + (f" ±{100 * error:.1f}" if error is not None else "")


def blocks_text(blocks: Sequence[int]) -> str:
    """`block 3 is`, `blocks 0, 5 are`: the subject of a sentence."""
    return f"block {blocks[0]} is" if len(blocks) == 1 else f"blocks {ranges(blocks)} are"


@said_in_python
def load_plan(path: str | Path) -> PrunePlan:
    """Read a plan that `plan` or `search` wrote.

    Args:
        path: The plan.json.

    Returns:
        The plan.

    Raises:
        ShortstackError: there is no such file, it is not a plan, or the plan contradicts itself.
    """
    path = Path(path)
    try:
        record = read_json(path.read_bytes())
        model = records.mapping(record, "model")
        if record.get("schema") != SCHEMA:
            raise ShortstackError(
                f"{path}: plan schema {record.get('schema')!r}, this shortstack reads {SCHEMA}",
                hint="make the plan again",
            )
        return PrunePlan(
            source=records.text(model, "source"),
            fingerprint=records.text(model, "fingerprint"),
            blocks=records.block_numbers(model, "blocks"),
            removed=records.block_numbers(record, "removed"),
            protected=records.block_numbers(record, "protected"),
            criterion=records.text(record, "criterion"),
            before=_sizes(record, "before"),
            after=_sizes(record, "after"),
            why=records.mapping(record, "why"),
            gone=records.block_numbers(record, "already_removed") if "already_removed" in record else (),
        )
    except FileNotFoundError:
        raise ShortstackError(
            f"{path}: no such file", hint="shortstack plan MODEL --out plan.json writes one"
        ) from None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ShortstackError(
            f"{path}: not a plan of shortstack ({system_reason(error)})", hint="make the plan again"
        ) from None


def _sizes(record: dict[str, Any], key: str) -> dict[str, int | None]:
    found = records.mapping(record, key)
    if not all(value is None or type(value) is int for value in found.values()):
        raise TypeError(f"{key} holds something other than sizes")
    return found
