"""One file per criterion; each says what it needs of the sweeps. A criterion never walks the model.

This module is the table, and it reads the names that users write: `ppl,taylor:p=2,weight=sum,magnitude`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from shortstack.errors import UsageError

Reduction = Literal["sum", "mean", "max", "prod"]
REDUCTIONS: tuple[Reduction, ...] = ("sum", "mean", "max", "prod")

# What a criterion needs: `branches` (a stream per skipped block), `backward` (gradients) or `weights` alone.
KINDS = {"ppl": "branches", "taylor": "backward", "magnitude": "weights"}
_PARAMETERS = {"ppl": (), "taylor": ("p", "weight", "block", "batch"), "magnitude": ("p", "weight", "block")}


@dataclass(frozen=True)
class Criterion:
    """One criterion with its parameters.

    Attributes:
        name: as the user wrote it; the key in scores.json.
        kind: ppl, taylor or magnitude.
        power: p of |w|^p or |w*g|^p, 1 or 2.
        weight_reduction: how the output rows of a tensor become one number.
        block_reduction: how the tensors of a block become one number.
        batch: windows per mean loss; None for one mean over all of them.
    """

    name: str
    kind: str
    power: int = 1
    weight_reduction: Reduction = "sum"
    block_reduction: Reduction = "sum"
    batch: int | None = None

    @property
    def needs(self) -> str:
        """What it needs of the sweeps: branches, backward or weights."""
        return KINDS[self.kind]


def parse_criteria(text: str) -> list[Criterion]:
    """`ppl,taylor:p=2,batch=10,magnitude` -> three criteria.

    Raises:
        UsageError: an unknown criterion or parameter, or one that is there twice.
    """
    names: list[str] = []
    for piece in text.split(","):
        part = piece.strip()
        # A comma also stands between the parameters of one criterion: `p=2` belongs to what came before it.
        if "=" in part and ":" not in part and names:
            names[-1] += f",{part}"
        else:
            names.append(part)
    criteria = [_parse_one(name) for name in names]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--criterion {text!r}: {name} is there twice")
    return criteria


def _parse_one(name: str) -> Criterion:
    kind, _, parameters = name.partition(":")
    if kind not in KINDS:
        raise UsageError(f"unknown criterion {kind!r}", hint=f"known: {', '.join(KINDS)}")
    given: dict[str, str] = {}
    for item in parameters.split(",") if parameters else []:
        key, _, value = item.partition("=")
        if key not in _PARAMETERS[kind] or key in given:
            known = ", ".join(_PARAMETERS[kind]) or "none"
            raise UsageError(f"criterion {name!r}: no parameter {key!r} here", hint=f"parameters of {kind}: {known}")
        given[key] = value
    return Criterion(
        name,
        kind,
        power=_whole(name, "p", given.get("p", "1"), at_most=2),
        weight_reduction=_reduction(name, given.get("weight", "sum")),
        block_reduction=_reduction(name, given.get("block", "sum")),
        batch=_whole(name, "batch", given["batch"]) if "batch" in given else None,
    )


def _whole(name: str, key: str, value: str, at_most: int = 10**6) -> int:
    if not re.fullmatch(r"\d{1,9}", value) or not 1 <= int(value) <= at_most:
        raise UsageError(f"criterion {name!r}: {key}={value}, expected a whole number from 1 to {at_most}")
    return int(value)


def _reduction(name: str, value: str) -> Reduction:
    for reduction in REDUCTIONS:
        if value == reduction:
            return reduction
    raise UsageError(f"criterion {name!r}: {value!r} is not a reduction", hint=f"known: {', '.join(REDUCTIONS)}")
