"""The options of training block by block: its steps, which blocks, and what is compared."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from shortstack.common.option_values import Amount
from shortstack.common.options import Options, expect
from shortstack.retraining.options import Steps


@dataclass(frozen=True)
class BlockSteps(Steps):
    """Training steps of each block.

    Attributes:
        epochs: The number of passes over the text for each block.
        tokens: Train every block on this many tokens of text, such as `1M`. By default it is 1M, or the whole of a
            shorter text.
        seq_len: The number of tokens in a window, or the length after which a row is truncated; at most the number of
            the model's positions.
        weight_decay: The weight decay of AdamW.
    """

    lr: float = 3e-4
    batch: int = 8
    micro_batch: int = 4
    warmup: int = 10
    epochs: float = 1
    tokens: Amount | None = None
    seq_len: int = 512
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        expect(self.seq_len >= 2, "seq_len", self.seq_len, "at least 2 tokens")
        expect(0 < self.epochs < math.inf, "epochs", self.epochs, "a number above 0")


@dataclass(frozen=True)
class BlockTargets(Options):
    """Which blocks are trained, and how, and what is compared.

    Attributes:
        radius: Train this many blocks on each side of each cut, or `all` blocks.
        lora_rank: Train an adapter of this rank on every matrix of a block, and fold it in. By default all weights of a
            block are trained.
        update_weight: The weight of a second distance, which is relative to the dense model's update from one remaining
            block to the next, instead of to its hidden states.
        cosine_weight: The weight of 1 minus the cosine between hidden states.
        states: Where hidden states are kept: in `memory`, or on `disk` beside OUT. `auto` uses the disk if they would
            fill half of the free memory.
    """

    radius: int | Literal["all"] = 2
    lora_rank: int | None = None
    update_weight: float = 0.0
    cosine_weight: float = 0.0
    states: Literal["auto", "memory", "disk"] = "auto"

    def __post_init__(self) -> None:
        expect(self.radius == "all" or self.radius >= 1, "radius", self.radius, "at least 1 block, or all")
        expect(self.lora_rank is None or self.lora_rank >= 1, "lora_rank", self.lora_rank, "at least 1")
        for name in ("update_weight", "cosine_weight"):
            expect(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "a number from 0 up")

    def described(self) -> dict[str, Any]:
        """What of it makes the result."""
        return {name: getattr(self, name) for name in ("radius", "lora_rank", "update_weight", "cosine_weight")}
