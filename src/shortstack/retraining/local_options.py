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
    """Steps of each block that is trained on its own.

    Attributes:
        epochs: The number of passes of each block over the text.
        tokens: Train on this many tokens of text, such as `1M`, all blocks on the same. By default it is 1M, or all of
            a shorter text.
        seq_len: The number of tokens in a window, or after which a row is cut off; at most the model's positions.
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
    """Which blocks are trained on their own, and what is compared.

    Attributes:
        radius: Train this many blocks on each side of each cut, or `all` blocks.
        lora_rank: Train an adapter of this rank on every matrix of a block, and fold it in. By default all weights of
            the block are trained.
        update_weight: The weight of the distance relative to what the dense model changes from one surviving block to
            the next, beside that relative to its hidden states.
        cosine_weight: The weight of 1 minus the cosine between hidden states.
        states: Where hidden states lie: in `memory`, or on `disk`, beside OUT. `auto` takes the disk where they would
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
