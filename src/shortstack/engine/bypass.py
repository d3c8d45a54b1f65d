"""Blocks of a loaded model, skipped or gated: other modules take their places for a while.

Legend: B windows in a batch, T tokens, N blocks.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

from shortstack.checkpoint.anatomy import Anatomy
from shortstack.engine.block_model import StandIn, find_blocks


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
