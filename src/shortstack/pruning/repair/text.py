"""What a repair gave, as a person reads it: of `repair`, and of `prune --repair`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from shortstack.common.formatting import table

_WORTH_SAYING = 1e-3  # nats that folding costs


def share_back(ppl: Mapping[str, float]) -> float | None:
    """Share of the log-perplexity that the removal had cost and that is back; None where it had cost nothing."""
    dense, pruned, repaired = (math.log(ppl[name]) for name in ("dense", "pruned", "repaired"))
    return (pruned - repaired) / (pruned - dense) if pruned > dense else None


def repair_text(places: Sequence[Mapping[str, Any]], ppl: Mapping[str, float]) -> list[str]:
    """Perplexity by method at each cut, with the repairs before it and without those behind it; then before and after."""
    methods = list(dict.fromkeys(method for place in places for method in place["ppl"]))
    rows = [
        (
            place["where"],
            *(f"{place['ppl'][one]:.4g}" if one in place["ppl"] else "-" for one in methods),
            place["method"],
        )
        for place in places
    ]
    lines = [
        table(["cut", *methods, "chosen"], rows),
        table(["", "perplexity"], [(name, f"{ppl[name]:.4g}") for name in ("dense", "pruned", "repaired")]),
    ]
    back = share_back(ppl)
    if back is not None and back < 0:
        lines.append(
            "the repaired model is worse than the pruned one, on the validation windows, which chose the repair"
        )
    elif back is not None:
        lines.append(
            f"{back:.0%} of the lost log-perplexity is recovered, on the validation windows, which chose the repair"
        )
    worse = [
        f"{place['where']} ({before:.4g} without it, {after:.4g} with it)"
        for place in places
        if (after := place["ppl"][place["method"]]) > (before := place["ppl"]["none"])
    ]
    if worse:
        lines.append(f"the repair makes these places worse: {', '.join(worse)}; the repair `auto` leaves them out")
    cost = math.log(ppl["repaired"]) - math.log(ppl["unfolded"])
    if abs(cost) >= _WORTH_SAYING:
        lines.append(
            f"in the weights the repair gives {ppl['repaired']:.4g} instead of {ppl['unfolded']:.4g}: rounding to the stored "
            "precision, and the norms' eps, which a factor does not go through"
        )
    return lines
