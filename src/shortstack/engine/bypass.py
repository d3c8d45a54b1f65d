"""Pass over blocks of a whole model in memory: what removing them from the checkpoint must compute, bit for bit."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Collection, Iterator
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
        """Within, these blocks (by position) are passed over: their hidden states go on as they came.

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

    def _learn(self, index: int) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            self._forms[index] = (type(output), len(output) if isinstance(output, (tuple, list)) else 1)

        return hook


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
