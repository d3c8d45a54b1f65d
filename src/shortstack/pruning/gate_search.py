"""`--selection gate:M`: the sets that a quadratic model of gates predicts to be the cheapest, measured and ranked by that.

Beside them stand what costs nothing more: what blocks cost one by one, added up, and block influence.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shortstack.common.formatting import named_blocks
from shortstack.errors import ShortstackError
from shortstack.scoring.agreement import kendall_tau

if TYPE_CHECKING:
    import torch

    from shortstack.engine.interface import RemovalSet
    from shortstack.pruning.set_search import SetSearch
    from shortstack.scoring.search.gates import QuadraticModel

_LOOKED_AT = 1000  # sets of the model, at least, where a family refuses some
# As defined for massive activations (Sun et al. 2024, arXiv 2402.17762).
_LARGE, _TIMES_MEDIAN = 100.0, 1000.0


@dataclass
class GateSearch:
    """What the gates of one model say.

    Attributes:
        model: the loss over the gates.
        influence: of each block, by position: 1 - the mean cosine of what goes in and what comes out.
        massive: of each block whose update holds a massive activation: its magnitude, and the median of the state after it.
        measured: of the sets that were measured last: the set, what the model says, what was measured.
    """

    model: QuadraticModel
    influence: list[float]
    massive: dict[int, tuple[float, float]]
    measured: list[tuple[RemovalSet, float, float]]

    def by_influence(self, places: Collection[int]) -> list[int]:
        """Blocks, those of the lowest influence first."""
        return sorted(places, key=lambda place: (self.influence[place], place))

    def to_json(self, sets: SetSearch) -> dict[str, Any]:
        """What a plan says of it; blocks by their numbers in the original model."""
        places = self.model.candidates
        dense, *of_each = sets.losses([frozenset(), *(frozenset({one}) for one in places)])
        alone = dict(zip(places, of_each, strict=True))
        changes = [change for _, _, change in self.measured]
        guesses = {
            "gates": [said for _, said, _ in self.measured],
            "one_by_one": [sum(alone[place] - dense for place in removed) for removed, _, _ in self.measured],
            "block_influence": [sum(self.influence[place] for place in removed) for removed, _, _ in self.measured],
        }
        return {
            "blocks": list(sets.blocks(self.model.candidates)),
            "gradient": self.model.gradient_N.tolist(),
            "hessian": self.model.hessian_NN.tolist(),
            "block_influence": [self.influence[place] for place in self.model.candidates],
            "massive": {
                str(sets.blocks([place])[0]): {"largest": largest, "median": median}
                for place, (largest, median) in self.massive.items()
            },
            "measured": [
                {"removed": list(sets.blocks(removed)), "added_nll": change, "by_gates": said, "one_by_one": added}
                for (removed, said, change), added in zip(self.measured, guesses["one_by_one"], strict=True)
            ],
            "tau": {name: _tau(values, changes) for name, values in guesses.items()},
        }

    def told(self) -> str:
        """How far the model's order is that of what was measured."""
        by_model = min(range(len(self.measured)), key=lambda number: self.measured[number][1])
        place = sorted(range(len(self.measured)), key=lambda number: self.measured[number][2]).index(by_model) + 1
        _, said, change = self.measured[by_model]
        return (
            f"gates: the set that they predict to be the cheapest is number {place} of {len(self.measured)} measured sets: "
            f"{said:+.3f} nats predicted, {change:+.3f} measured"
        )

    def note(self, sets: SetSearch, removed: RemovalSet) -> str:
        """A line where blocks of a set write massive activations."""
        lines = [
            f"{named_blocks(sets.blocks([place]))} writes massive activations (up to {largest:.3g}; the state's median is "
            f"{median:.2g}): attention in all later blocks depends on them, so the gates predict its removal poorly"
            for place, (largest, median) in self.massive.items()
            if place in removed
        ]
        return "\n".join(lines)


def gate_sets(sets: SetSearch, wanted: int) -> list[RemovalSet]:
    """The measured sets of so many blocks, the cheapest first.

    Raises:
        ShortstackError: none of the sets that were looked at can be removed exactly.
    """
    gates = gates_of(sets)
    most, chosen = max(_LOOKED_AT, 20 * sets.selection.number), []
    for removed in itertools.islice(gates.model.cheapest(wanted), most):
        if sets.reason_against(removed) is None:
            chosen.append(removed)
        if len(chosen) == sets.selection.number:
            break
    if not chosen:
        raise ShortstackError(
            f"{sets.checkpoint.source}: none of the {most} sets of {wanted} blocks that the gates predict to be the cheapest "
            f"can be removed exactly: {next(iter(sets.refused.values()))}",
            hint="use --selection greedy, or remove fewer blocks",
        )
    dense, *losses = sets.losses([frozenset(), *chosen])
    gates.measured = [
        (removed, gates.model.change(removed), loss - dense) for removed, loss in zip(chosen, losses, strict=True)
    ]
    sets.progress.say(gates.told())
    costs = dict(zip(chosen, sets.costs(chosen), strict=True))
    return sorted(chosen, key=lambda removed: (costs[removed], sorted(removed)))


def gates_of(sets: SetSearch) -> GateSearch:
    """What the gates of a search's model say, worked out once."""
    if sets.gates is not None:
        return sets.gates
    from shortstack.scoring.search.gates import quadratic_model

    choosing = sets.choosing
    file = choosing.file.with_name("gates.jsonl") if choosing.file is not None else None
    with sets.progress.bar("gates", 1 + len(sets.free)) as advance:
        model = quadratic_model(
            choosing.engine,
            sets.free,
            text=choosing.text,
            file=file,
            key=choosing.key,
            on_progress=advance,
        )
    sets.gates = GateSearch(model, *_states(sets), [])
    return sets.gates


def _states(sets: SetSearch) -> tuple[list[float], dict[int, tuple[float, float]]]:
    """(block influence of every block, massive activations that blocks write), of the dense model."""
    import torch
    from torch.nn import functional

    from shortstack.engine.interface import ForwardRequest

    engine, process = sets.choosing.engine, sets.choosing.process
    sums_N2 = torch.zeros(len(engine.blocks), 2, dtype=torch.float64)
    massive: dict[int, tuple[float, float]] = {}

    def shown(index: int, _: Any, __: slice, came_BTD: torch.Tensor, left_BTD: torch.Tensor) -> None:
        came, left = came_BTD.flatten(2).float(), left_BTD.flatten(2).float()
        turned = 1 - functional.cosine_similarity(came, left, dim=-1)
        sums_N2[index] += torch.tensor([float(turned.sum()), turned.numel()], dtype=torch.float64)
        largest, median = float((left - came).abs().amax()), float(left.abs().median())
        if largest > max(_LARGE, _TIMES_MEDIAN * median, massive.get(index, (0.0, 0.0))[0]):
            massive[index] = (largest, median)

    engine.forward(sets.choosing.own, ForwardRequest(on_hidden=shown))
    sums_N2 = process.summed(sums_N2)
    return (sums_N2[:, 0] / sums_N2[:, 1]).tolist(), massive


def _tau(values: Sequence[float], others: Sequence[float]) -> float | None:
    """Kendall's tau of two orders of the same sets; None of fewer than two."""
    if len(values) < 2:
        return None
    orders = [sorted(range(len(one)), key=one.__getitem__) for one in (values, others)]
    tau = kendall_tau(*orders)
    return tau if math.isfinite(tau) else None
