"""Other modules in the places of a model's blocks, for a while: to learn what blocks are called with, to give the model
hidden states from elsewhere, to skip blocks or gate them. So no family needs code of its own.

Legend: B windows in a batch, T tokens, D hidden size, N blocks.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shortstack.checkpoint.anatomy import Anatomy
from shortstack.errors import ShortstackError


def find_blocks(model: nn.Module, anatomy: Anatomy) -> tuple[str, nn.ModuleList]:
    """(name, list of blocks) of a model: the module list as long as the checkpoint is deep, the one named as on disk if
    there are several.

    Raises:
        ShortstackError: there is none.
    """
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == anatomy.depth and "vision" not in name
    ]
    if not lists:
        raise ShortstackError(f"transformers built no list of {anatomy.depth} blocks in {type(model).__name__}")
    last = anatomy.prefix.rstrip(".").rpartition(".")[2]
    # The outermost one: lists inside blocks (of experts, say) have longer names.
    return min(lists, key=lambda found: (found[0].rpartition(".")[2] != last, found[0].count("."), found[0]))


class StandIn(nn.Module):
    """Takes a block's place; what the model reads from the block (its attention type, say) is passed on."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "_block", block)  # not a submodule: the model's parameters stay what they are

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._block, name)


@dataclass(frozen=True)
class BlockCall:
    """What one block is called with beside its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Recorded(Exception):  # noqa: N818 - a signal, not an error
    """Raised after the last block: final norm and head are not needed to learn arguments."""


class Recordable(StandIn):
    """A stand-in that gives hidden states in the form in which the model expects them."""

    def __init__(self, block: nn.Module, returns_tuple: bool) -> None:
        super().__init__(block)
        self.returns_tuple = returns_tuple

    def _split(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, tuple[Any, ...]]:
        """(hidden states, other positional arguments); some models give hidden states by keyword."""
        return (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())

    def _result(self, hidden_BTD: torch.Tensor) -> Any:
        return (hidden_BTD, None) if self.returns_tuple else hidden_BTD


class Recorder(Recordable):
    """Gives its hidden states back as they came, and notes what else it was called with."""

    def __init__(
        self, block: nn.Module, returns_tuple: bool, log: list[tuple[torch.Tensor, BlockCall]], last: bool
    ) -> None:
        super().__init__(block, returns_tuple)
        self._log = log
        self._last = last

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """In the block's place."""
        hidden_BTD, args = self._split(args, kwargs)
        self._log.append((hidden_BTD, BlockCall(args, {key: _without_cache(value) for key, value in kwargs.items()})))
        if self._last:
            raise Recorded
        return self._result(hidden_BTD)


class Injector(Recordable):
    """The first block's place-holder: whatever comes in, it returns `hidden_BTD`."""

    hidden_BTD: torch.Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """In the block's place."""
        given_BTD, _ = self._split(args, kwargs)
        return self._result(given_BTD if self.hidden_BTD is None else self.hidden_BTD)


def _without_cache(value: Any) -> Any:
    """Some families pass a live cache although it is switched off; a replayed call would append to it."""
    return None if type(value).__name__.endswith("Cache") else value


def bypassed_logits(model: nn.Module, anatomy: Anatomy, skipped: Collection[int], ids_BT: torch.Tensor) -> torch.Tensor:
    """Logits of a whole model with some blocks (by position) bypassed: what a pruned checkpoint must compute, bit for bit."""
    bypass = Bypass(model, anatomy, ids_BT[:1, :4])
    with torch.no_grad(), bypass.over(skipped):
        logits: torch.Tensor = model(input_ids=ids_BT, use_cache=False).logits
    return logits


class Bypass:
    """Passes over blocks of one model. The form of what a block gives is learnt by running the model once.

    Args:
        model: a whole model, weights in.
        anatomy: of the checkpoint that it was loaded from.
        ids_BT: a few token ids to run it on.

    Attributes:
        blocks: the model's list of blocks.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, ids_BT: torch.Tensor) -> None:
        _, self.blocks = find_blocks(model, anatomy)
        self._carried = anatomy.family.carried
        self._forms: dict[int, tuple[type, int]] = {}
        handles = [block.register_forward_hook(self._learn(index)) for index, block in enumerate(self.blocks)]
        try:
            with torch.no_grad():
                model(input_ids=ids_BT, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def over(self, skipped: Collection[int], *, run: bool = False) -> Iterator[None]:
        """Within, these blocks (by position) are skipped: hidden states leave them unchanged.

        Args:
            skipped: which.
            run: run them all the same, for the state that other blocks take from them.
        """
        originals = {index: self.blocks[index] for index in skipped}
        for index, block in originals.items():
            self.blocks[index] = _PassedOver(block, self._forms[index], self._carried, run)
        try:
            yield
        finally:
            for index, block in originals.items():
                self.blocks[index] = block

    @contextlib.contextmanager
    def gated(self, gates_N: torch.Tensor) -> Iterator[None]:
        """Within, what each block adds to its hidden states is multiplied by its gate."""
        originals = list(self.blocks)
        for index, block in enumerate(originals):
            self.blocks[index] = _Gated(block, gates_N[index])
        try:
            yield
        finally:
            for index, block in enumerate(originals):
                self.blocks[index] = block

    def _learn(self, index: int) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            self._forms[index] = (type(output), len(output) if isinstance(output, (tuple, list)) else 1)

        return hook


class _Gated(StandIn):
    """Gives what came in, and of what the block adds a share."""

    def __init__(self, block: nn.Module, gate: torch.Tensor) -> None:
        super().__init__(block)
        object.__setattr__(self, "_gate", gate)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        came, output = args[0] if args else kwargs["hidden_states"], self._block(*args, **kwargs)
        if isinstance(output, (tuple, list)):
            return type(output)([came + self._gate * (output[0] - came), *output[1:]])
        return came + self._gate * (output - came)


class _PassedOver(StandIn):
    """Gives its hidden states back as they came, in the form in which the block gives them."""

    def __init__(self, block: nn.Module, form: tuple[type, int], carried: str, run: bool) -> None:
        super().__init__(block)
        self._signature = inspect.signature(block.forward)
        self._form = form
        self._carried = carried
        self._run = run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = self._signature.bind_partial(*args, **kwargs).arguments
        hidden = next(iter(given.values()))
        kind, length = self._form
        if self._run:
            output = self._block(*args, **kwargs)
            return kind([hidden, *output[1:]]) if kind in (tuple, list) else hidden
        if kind not in (tuple, list):
            return hidden
        extra = given.get(self._carried, given.get("kwargs", {}).get(self._carried)) if self._carried else None
        return kind([hidden, extra, *[None] * (length - 2)][:length])
