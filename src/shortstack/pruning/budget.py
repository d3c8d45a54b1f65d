"""From a budget to a number of blocks: the one place where that is worked out."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.formatting import count, counted, parse_size, size
from shortstack.errors import ShortstackError, UsageError
from shortstack.pruning.options import AMOUNTS, Budget


@dataclass(frozen=True)
class Sizes:
    """What blocks take, in the order in which they go, and what the whole model takes.

    Attributes:
        source: the model.
        parameters, nbytes, seconds: of each block; seconds are there for `--speedup` alone.
        all_parameters, all_nbytes, all_seconds: of the whole model.
    """

    source: str
    parameters: Sequence[int]
    nbytes: Sequence[int]
    all_parameters: int
    all_nbytes: int
    seconds: Sequence[float] = field(default=())
    all_seconds: float = 0.0


def sizes_of(
    checkpoint: Checkpoint, positions: Sequence[int], seconds: Sequence[float] = (), outside_seconds: float = 0.0
) -> Sizes:
    """What the blocks at these positions take, in this order.

    Args:
        checkpoint: the model.
        positions: of blocks.
        seconds: what each block of the model takes, where `--speedup` needs it.
        outside_seconds: what the model takes beside its blocks.
    """
    parameters = checkpoint.block_parameters()
    nbytes = [sum(tensor.nbytes for tensor in block) for block in checkpoint.blocks]
    return Sizes(
        checkpoint.source,
        [parameters[place] for place in positions],
        [nbytes[place] for place in positions],
        checkpoint.parameters(),
        checkpoint.nbytes,
        [seconds[place] for place in positions] if seconds else (),
        outside_seconds + sum(seconds),
    )


def check_one_amount(budget: Budget) -> None:
    """Refuse a budget that does not say how much goes, or says it twice.

    Raises:
        UsageError: it does not, or does.
    """
    amounts = budget.amounts
    if len(amounts) != 1:
        found = "none" if not amounts else " and ".join(amounts)
        every = ", ".join(f"--{name.replace('_', '-')}" for name in AMOUNTS)
        raise UsageError(f"give one of {every} (found {found})", hint="such as --remove 6")


def is_of_measurements(budget: Budget) -> bool:
    """Whether how many blocks go is known only once something was measured."""
    return budget.speedup is not None or budget.ppl_ceiling is not None


def amount_to_remove(sizes: Sizes, budget: Budget) -> int:
    """How many of the blocks go, in their order; for every budget but a ceiling of perplexity, which a search keeps.

    Raises:
        UsageError: the amount is out of range.
        ShortstackError: all blocks together are not enough for it.
    """
    if budget.remove is not None:
        if budget.remove < 0:
            raise UsageError(f"--remove {budget.remove}: expected 0 or more blocks")
        return budget.remove
    left = _left(sizes.all_parameters, sizes.parameters)
    if budget.ratio is not None:
        if not 0 <= budget.ratio < 1:
            raise UsageError(f"--ratio {budget.ratio}: expected a share of the parameters, 0 <= ratio < 1")
        most = budget.ratio * sizes.all_parameters + 1e-9
        return max(k for k in range(len(left)) if sizes.all_parameters - left[k] <= most)
    if budget.bytes is not None:
        return _for_bytes(sizes, budget.bytes)
    if budget.speedup is not None:
        return _for_speedup(sizes, budget.speedup)
    target = parse_amount(budget.params or "")
    if target > sizes.all_parameters:
        raise UsageError(
            f"--params {budget.params}: the model has {count(sizes.all_parameters)} parameters",
            hint="give a smaller number, or --remove K",
        )
    return min(range(len(left)), key=lambda k: (abs(left[k] - target), k))


def _for_bytes(sizes: Sizes, text: str) -> int:
    target, left = parse_size(text, "--bytes"), _left(sizes.all_nbytes, sizes.nbytes)
    enough = [k for k, nbytes in enumerate(left) if nbytes <= target]
    if not enough:
        raise ShortstackError(
            f"--bytes {text}: without all {counted(len(sizes.nbytes), 'removable block')} the weights of {sizes.source} "
            f"still take {size(int(left[-1]))}",
            hint=f"--bytes {-(-int(left[-1]) // 10**6)}MB or more, or quantize the pruned model",
        )
    return enough[0]


def _for_speedup(sizes: Sizes, wanted: float) -> int:
    if not (math.isfinite(wanted) and wanted >= 1):
        raise UsageError(f"--speedup {wanted}: expected a number of at least 1, such as 1.3")
    speedups = [sizes.all_seconds / max(left, 1e-12) for left in _left(sizes.all_seconds, sizes.seconds)]
    enough = [k for k, speedup in enumerate(speedups) if speedup >= wanted]
    if not enough:
        raise ShortstackError(
            f"--speedup {wanted:g}: without all {counted(len(sizes.seconds), 'removable block')} {sizes.source} is "
            f"{speedups[-1]:.2f} times as fast here",
            hint=f"--speedup {math.floor(speedups[-1] * 100) / 100:g} or less",
        )
    return enough[0]


def _left(total: float, sizes: Sequence[float]) -> list[float]:
    left = [total]
    for one in sizes:
        left.append(left[-1] - one)
    return left


def parse_amount(text: str, option: str = "--params", what: str = "parameters") -> int:
    """`5.5B` -> 5500000000 (K, M, B and T are powers of a thousand)."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{0,18})?)\s*([kKmMbBtT]?)\s*", text)
    if not match:
        raise UsageError(f"{option} {text!r} is not a number of {what}", hint="such as 5.5B, 700M or 5524115456")
    power = {"": 0, "k": 3, "m": 6, "b": 9, "t": 12}[match.group(2).lower()]
    return round(float(match.group(1)) * 10.0**power)


def ceiling_nll(text: str, dense_nll: float) -> float:
    """The mean NLL under a ceiling of perplexity: `12.5` -> ln 12.5; `1.2x` -> the dense model's plus ln 1.2.

    Raises:
        UsageError: it is neither.
    """
    match = re.fullmatch(r"\s*(\d{1,12}(?:\.\d{0,12})?)\s*(x?)\s*", text)
    if not match or float(match.group(1)) < 1:
        raise UsageError(f"--ppl-ceiling {text!r}: expected a perplexity, or a multiple of the dense one", hint="1.2x")
    return math.log(float(match.group(1))) + (dense_nll if match.group(2) else 0.0)
