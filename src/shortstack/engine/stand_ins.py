"""What stands in a block's place while the model runs without its blocks: a recorder of calls, an injector of hidden states.

Legend: B windows in a batch, T tokens, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shortstack.engine.bypass import StandIn


@dataclass(frozen=True)
class BlockCall:
    """What one block is called with beside its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Recorded(Exception):  # noqa: N818 - a signal, not an error
    """Raised after the last block: final norm and head are not needed to learn arguments."""


class Normed(Exception):  # noqa: N818 - a signal, not an error
    """Raised where the head would be called, with what it would be given."""

    def __init__(self, hidden_BTD: torch.Tensor) -> None:
        self.hidden_BTD = hidden_BTD


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
    """The first block's place-holder: whatever comes in, `hidden_BTD` goes on."""

    hidden_BTD: torch.Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """In the block's place."""
        given_BTD, _ = self._split(args, kwargs)
        return self._result(given_BTD if self.hidden_BTD is None else self.hidden_BTD)


def _without_cache(value: Any) -> Any:
    """Some families pass a live cache although it is switched off; a replayed call would append to it."""
    return None if type(value).__name__.endswith("Cache") else value
