"""The options of width pruning: how much goes, and of what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from shortstack.common.option_values import Amount
from shortstack.common.options import Options, expect
from shortstack.errors import UsageError

Only = Literal["mlp", "heads"]
HeadUnit = Literal["kv-groups", "query-heads"]


@dataclass(frozen=True)
class WidthChoice(Options):
    """How much of every block is removed: the same number of heads and channels, because the config states one number.

    Attributes:
        ratio: Remove the most heads and channels whose share of the model's parameters is at most this, such as 0.2.
        params: Remove heads and channels until the number of parameters is nearest to this, such as `5.5B`.
        only: Remove only one kind of unit: `mlp` removes only channels, `heads` only attention heads. By default about
            the same share of both is removed.
        head_unit: The unit of attention to remove: `kv-groups` removes a key-value head with all its query heads;
            `query-heads` removes the same number of query heads from each group and keeps every key-value head.
        multiple_of: Keep a number of channels that is a multiple of this, such as 64, because many engines are faster
            with such sizes.
    """

    # What one of them, chosen by hand, takes the place of in a recipe.
    REPLACES: ClassVar[Mapping[str, tuple[str, ...]]] = {"ratio": ("params",), "params": ("ratio",)}

    ratio: float | None = None
    params: Amount | None = None
    only: Only | None = None
    head_unit: HeadUnit = "kv-groups"
    multiple_of: int = 1

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        expect(
            self.ratio is None or 0 < self.ratio < 1, "ratio", self.ratio, "a share of the parameters, 0 < ratio < 1"
        )
        expect(self.multiple_of >= 1, "multiple_of", self.multiple_of, "a whole number of at least 1")
        if self.only == "mlp" and self.head_unit != "kv-groups":
            raise UsageError(
                "--head-unit: no effect with --only mlp, which keeps all heads", hint="leave one of them out"
            )
        if self.only == "heads" and self.multiple_of != 1:
            raise UsageError(
                "--multiple-of: no effect with --only heads, which keeps all channels", hint="leave it out"
            )


@dataclass(frozen=True)
class WriteOptions(Options):
    """How a narrower checkpoint is written.

    Attributes:
        verify: Load the result and compare bytes, config and logits with those of the original with the removed heads
            and channels masked to zero.
        force: Replace an existing output that shortstack made.
        allow_nonfinite: Copy tensors that hold NaN or infinity.
    """

    verify: bool = False
    force: bool = False
    allow_nonfinite: bool = False
