"""The table of criteria, and what a criterion is: one file and one row.

A criterion gives every block a number. It declares what it needs, never walks the model, and is called with what the sweeps
have at a block. This module imports no torch: the command line reads names with it, such as `ppl,taylor:p=2,magnitude`.

Legend: B windows that are shown together, W all windows, T tokens, D hidden size, V vocabulary, N blocks that are scored.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from shortstack.errors import UsageError, did_you_mean
from shortstack.scoring.parameters import OneOf, WholeNumber
from shortstack.scoring.swept import Swept

if TYPE_CHECKING:
    import torch
    from torch import nn

    from shortstack.artifacts.scores import CriterionScores
    from shortstack.engine.interface import Windows
    from shortstack.engine.losses import Predictions

__all__ = ["CRITERIA", "BlockPass", "Criterion", "LogitsPass", "RequestedCriterion", "Row", "StatesPass", "Swept"]

# weights: `on_block`, once per block. hidden: `on_block` with what goes in and comes out. gradients: `on_block` with those of
# the block's weights. branches: the losses without each block, in `finish`. logits: `on_logits`, dense and without a block.
# states: `on_states`, what goes into every block. others: the scores of all other criteria that were requested, in `finish`.
Need = Literal["weights", "hidden", "states", "gradients", "branches", "logits", "others"]
Reduction = Literal["sum", "mean", "max", "prod"]
REDUCTIONS: tuple[Reduction, ...] = ("sum", "mean", "max", "prod")


Parameters = Mapping[str, WholeNumber | OneOf]


@dataclass(frozen=True)
class Row:
    """What is known of a criterion before it runs.

    Attributes:
        location: `module:class`, a `Criterion`; it is imported when it is used.
        needs: what its hooks are to be given.
        parameters: those that a user may write in its name, with their defaults.
    """

    location: str
    needs: frozenset[Need]
    parameters: Parameters = field(default_factory=dict)


_REDUCED: Parameters = {
    "p": WholeNumber(1, at_most=2),
    "weight": OneOf("sum", REDUCTIONS),
    "block": OneOf("sum", REDUCTIONS),
}

_FIRST_TOKEN: Parameters = {"first_token": OneOf("count", ("count", "skip"))}

CRITERIA: dict[str, Row] = {
    "ppl": Row("shortstack.scoring.criteria.ppl:Perplexity", frozenset({"branches"})),
    "taylor": Row(
        "shortstack.scoring.criteria.taylor:Taylor",
        frozenset({"gradients"}),
        {**_REDUCED, "batch": WholeNumber(None)},
    ),
    "magnitude": Row("shortstack.scoring.criteria.magnitude:Magnitude", frozenset({"weights"}), _REDUCED),
    "bi": Row("shortstack.scoring.criteria.bi:BlockInfluence", frozenset({"hidden"}), _FIRST_TOKEN),
    "update": Row("shortstack.scoring.criteria.update:RelativeUpdate", frozenset({"hidden"}), _FIRST_TOKEN),
    "angular": Row(
        "shortstack.scoring.criteria.angular:AngularDistance",
        frozenset({"states"}),
        {"n": WholeNumber(1), "tokens": OneOf("last", ("last", "all")), **_FIRST_TOKEN},
    ),
    "cluster": Row("shortstack.scoring.criteria.cluster:Clusters", frozenset({"states"})),
    "kl": Row("shortstack.scoring.criteria.kl:Divergence", frozenset({"logits"})),
    "accept": Row("shortstack.scoring.criteria.accept:Rejection", frozenset({"logits"})),
    "ensemble": Row("shortstack.scoring.criteria.ensemble:Ensemble", frozenset({"others"})),
}


# Never scored, whatever their shape: not weights of a linear map or a norm.
_NEVER = ("A_log", "D", "sinks")


@dataclass(frozen=True)
class ScoredParameter:
    """A parameter that criteria score.

    Attributes:
        name: within the block.
        output_dim: the dimension of its output rows; the others are summed over first. A norm weight has only this one.
    """

    name: str
    output_dim: int


def scored_parameters(block: nn.Module) -> list[ScoredParameter]:
    """Every parameter of two or more dimensions and every norm weight; never biases, sinks, A_log, D.

    For Llama-like blocks: the seven linear weights and the two norm weights, as published.
    """
    found = []
    for name, parameter in block.named_parameters():
        owner_name, _, last = name.rpartition(".")
        kind = type(block.get_submodule(owner_name)).__name__
        if last in _NEVER or "bias" in last:
            continue
        if parameter.ndim >= 2:
            # transformers' Conv1D (GPT-2) keeps its matrix as [input, output], everything else as [output, input].
            found.append(ScoredParameter(name, parameter.ndim - 1 if kind == "Conv1D" else 0))
        elif last == "weight" and "norm" in kind.lower():
            found.append(ScoredParameter(name, 0))
    return found


@dataclass(frozen=True)
class BlockPass:
    """A block, and what a sweep has at it. Tensors are lent for the call, and must not be changed.

    Attributes:
        index: the block's position in the checkpoint.
        weights: by name within the block.
        scored: those of them that are scored (matrices and norm weights), with the dimension of their output rows.
        windows: which of this process's windows went through; empty where none did.
        inputs_BTD, outputs_BTD: hidden states of the dense model; None where they are not needed.
        gradients: of the scored weights, complete over all windows of all processes. A weight that the loss does not reach is
            absent. None in a forward sweep.
    """

    index: int
    weights: dict[str, torch.Tensor]
    scored: list[ScoredParameter]
    windows: slice
    inputs_BTD: torch.Tensor | None = None
    outputs_BTD: torch.Tensor | None = None
    gradients: dict[str, torch.Tensor] | None = None

    def hidden_states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What goes in and what comes out, [B, T, D], for a criterion that needs hidden states."""
        if self.inputs_BTD is None or self.outputs_BTD is None:
            raise ValueError("a criterion that reads hidden states must name them in its row's needs")
        return self.inputs_BTD, self.outputs_BTD


@dataclass(frozen=True)
class StatesPass:
    """What goes into every block of the dense model, and what comes out of the last one. Tensors are lent for the call.

    Attributes:
        candidates: positions of the blocks that are scored, ascending.
        windows: which of this process's windows: all of them.
        inputs: what goes into each block, [W, T, D] or, where a family has several states of a token, more dimensions.
        last: what comes out of the last block, before the final norm.
    """

    candidates: tuple[int, ...]
    windows: slice
    inputs: Sequence[torch.Tensor]
    last: torch.Tensor

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.inputs)

    def at(self, place: int) -> torch.Tensor:
        """What goes into the block at a position, [W, T, D]; for the number of blocks, what comes out of the last one."""
        return (self.inputs[place] if place < self.depth else self.last).flatten(2)


@dataclass(frozen=True)
class LogitsPass:
    """What is predicted of the same tokens by the dense model and without a block; a slice that fits in memory.

    Attributes:
        index: the position of the block that is skipped.
        windows: which of this process's windows.
        tokens: which of their tokens.
        dense, without: the predictions.
        swept: all of this process's windows: their tokens, and which of them count.
    """

    index: int
    windows: slice
    tokens: slice
    dense: Predictions
    without: Predictions
    swept: Windows

    @property
    def ids_BT(self) -> torch.Tensor:  # noqa: N802 - a tensor's name has its dimensions
        """The tokens themselves."""
        return self.swept.ids_WT[self.windows, self.tokens]

    def summed(self, values_BT: torch.Tensor) -> torch.Tensor:
        """Each window's sum, in float64, of the values at positions whose next token is in the window and counts, [B]."""
        from shortstack.engine.losses import summed

        ids_WT, counted_WT = self.swept.ids_WT, self.swept.counted_WT
        following = slice(self.tokens.start + 1, self.tokens.stop + 1)
        counted_BT = None if counted_WT is None else counted_WT[self.windows, following]
        at_end = self.tokens.stop == ids_WT.shape[1]  # the last position of a window predicts nothing
        return summed(values_BT[:, :-1] if at_end else values_BT, counted_BT)


class Criterion:
    """One criterion in one run. A subclass has the hooks that its row's needs call, and `finish`.

    Args:
        name: as the user wrote it, with its parameters; the key in scores.json.
        parameters: all that its row declares.

    Attributes:
        kept: what it has found so far, by block position, in what JSON can hold. It belongs to the saved state of a run: what
            a criterion keeps elsewhere is lost when a run is killed.
        batch: with gradients, of how many windows each mean loss is taken; None for one mean over all windows.
        of_sources: criteria like this one, by the named source whose gradients alone they are shown.
    """

    batch: int | None = None

    def __init__(self, name: str, parameters: Mapping[str, Any]) -> None:
        self.name = name
        self.parameters = parameters
        self.kept: dict[int, Any] = {}
        self.of_sources: dict[str, Criterion] = {}

    def on_block(self, block: BlockPass) -> None:
        """A sweep is at a block: once per block, or, with hidden states, once per block and some windows."""

    def on_states(self, states: StatesPass) -> None:
        """What goes into every block is there: once."""

    def on_logits(self, logits: LogitsPass) -> None:
        """Logits with and without a block are there: once per block and slice."""

    def finish(self, swept: Swept) -> CriterionScores:
        """A score for each block of `swept.blocks`; in every process the same."""
        raise NotImplementedError(f"{type(self).__name__}.finish")

    def add(self, index: int, windows: slice, values_B: torch.Tensor) -> None:
        """Add to a block's number of each of these windows, which begins at 0; `Swept.per_window` has the sums."""
        sums: list[float] = self.kept.setdefault(index, [])
        sums.extend([0.0] * (windows.stop - len(sums)))
        for window, value in zip(range(windows.start, windows.stop), values_B.tolist(), strict=True):
            sums[window] += value


@dataclass(frozen=True)
class RequestedCriterion:
    """A criterion with the parameters that a user gave it.

    Attributes:
        name: as the user wrote it.
        row: of the table.
        parameters: all of them, defaults too.
    """

    name: str
    row: Row
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def needs(self) -> frozenset[Need]:
        """What its hooks are to be given."""
        return self.row.needs

    @property
    def needs_windows(self) -> bool:
        """Whether calibration windows are run for it."""
        return bool(self.needs - {"weights", "others"})

    def start(self) -> Criterion:
        """The criterion itself, for one run."""
        module, _, name = self.row.location.partition(":")
        started: Criterion = getattr(importlib.import_module(module), name)(self.name, self.parameters)
        return started


def criteria_text() -> str:
    """The criteria of the table, with the parameters that each takes, for help and documents."""
    return ", ".join(
        f"`{name}`" + (f" (parameters {', '.join(row.parameters)})" if row.parameters else "")
        for name, row in CRITERIA.items()
    )


def parse_criteria(text: str) -> list[RequestedCriterion]:
    """`ppl,taylor:p=2,batch=10,magnitude` -> three criteria; `all` -> every one of the table.

    Raises:
        UsageError: an unknown criterion or parameter, or a duplicate one.
    """
    names: list[str] = []
    if text.strip() == "all":
        return [_parse_one(name) for name in CRITERIA]
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
            raise UsageError(f"--criterion {text!r}: duplicate {name}", hint="name each criterion once")
    for asked in criteria:
        if "others" in asked.needs and sum("others" not in one.needs for one in criteria) < 2:
            raise UsageError(
                f"--criterion {text!r}: {asked.name} needs at least two other criteria",
                hint=f"such as ppl,taylor,{asked.name}",
            )
    return criteria


_NOT_ROWS = {
    "all": "`all` cannot be combined with other criteria: --criterion all",
    "gate": "gates predict the cost of sets of blocks, not of single blocks: shortstack search MODEL --selection gate:32",
}


def _parse_one(name: str) -> RequestedCriterion:
    known, _, listed = name.partition(":")
    if known not in CRITERIA:
        raise UsageError(f"unknown criterion {known!r}", hint=_NOT_ROWS.get(known) or did_you_mean(known, CRITERIA))
    row = CRITERIA[known]
    given: dict[str, Any] = {}
    for item in listed.split(",") if listed else []:
        key, _, text = item.partition("=")
        if key not in row.parameters or key in given:
            hint = did_you_mean(key, row.parameters) if row.parameters else f"{known} has no parameters"
            raise UsageError(f"criterion {name!r}: has no parameter {key!r}", hint=hint)
        try:
            given[key] = row.parameters[key].read(text)
        except ValueError as expected:
            words = getattr(row.parameters[key], "words", ())
            hint = did_you_mean(text, words) if words else ""
            raise UsageError(f"criterion {name!r}: {key}={text}, expected {expected}", hint=hint) from None
    return RequestedCriterion(name, row, {key: given.get(key, one.default) for key, one in row.parameters.items()})
