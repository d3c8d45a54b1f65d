"""From a budget to a number of blocks: the one place where that is worked out."""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.formatting import count, counted, parse_size, size
from shortstack.common.options import refuse_idle
from shortstack.errors import ShortstackError, UsageError
from shortstack.pruning.block_seconds import NOT_TIMED, BlockSeconds
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
    if budget.speedup is None:
        refuse_idle(budget, ["times"], "without --speedup")


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
    whole, gone = _of_budget(sizes, budget)
    return _amount(sizes, budget, dict(enumerate(whole - taken for taken in itertools.accumulate(gone, initial=0))))


def amount_of_sets(
    checkpoint: Checkpoint,
    free: Sequence[int],
    budget: Budget,
    set_of: Callable[[int], Collection[int]],
    times: BlockSeconds = NOT_TIMED,
) -> int:
    """How many blocks go, where the set that is chosen for each number is known: the set itself keeps the budget.

    Sets are chosen of those numbers alone for which it matters which blocks go: of none where blocks are of one size.

    Args:
        checkpoint: the model.
        free: positions of the removable blocks.
        budget: how much goes.
        set_of: positions of the blocks that go, of a number of them.
        times: of the blocks, where `--speedup` needs them.

    Raises:
        UsageError: the amount is out of range.
        ShortstackError: all blocks together are not enough for it.
    """
    sizes = sizes_of(checkpoint, free, times.blocks, times.outside)
    if budget.remove is not None:
        return amount_to_remove(sizes, budget)
    whole, of_free = _of_budget(sizes, budget)
    own = dict(zip(free, of_free, strict=True))
    smallest_first = sorted(free, key=own.__getitem__)
    few, many = (
        amount_to_remove(sizes_of(checkpoint, order, times.blocks, times.outside), budget)
        for order in (smallest_first[::-1], smallest_first)
    )
    if few == many:
        return few
    left: dict[int, float] = {}
    for number in range(few, min(many, checkpoint.depth - 1) + 1):
        with contextlib.suppress(ShortstackError):  # no set of so many can go; of more some may
            left[number] = whole - sum(own[place] for place in set_of(number))
            if budget.ratio is None and budget.params is None and left[number] <= _most_left(sizes, budget):
                break  # the fewest
    # Where no set keeps a ratio, the number that could: the search of it says why no set of so many can go.
    return max(few, _amount(sizes, budget, left)) if left else few


def _of_budget(sizes: Sizes, budget: Budget) -> tuple[float, Sequence[float]]:
    """What the budget counts, of the whole model and of each block."""
    if budget.speedup is not None:
        return sizes.all_seconds, sizes.seconds
    if budget.bytes is not None:
        return sizes.all_nbytes, sizes.nbytes
    return sizes.all_parameters, sizes.parameters


def _amount(sizes: Sizes, budget: Budget, left: Mapping[int, float]) -> int:
    """The number of blocks that the budget means, by what is left without each number."""
    if budget.ratio is not None:
        if not 0 <= budget.ratio < 1:
            raise UsageError(f"--ratio {budget.ratio}: expected a share of the parameters, 0 <= ratio < 1")
        most = budget.ratio * sizes.all_parameters + 1e-9
        return max((k for k in left if sizes.all_parameters - left[k] <= most), default=0)
    if budget.params is not None:
        target = parse_amount(budget.params)
        if target > sizes.all_parameters:
            raise UsageError(
                f"--params {budget.params}: the model has {count(sizes.all_parameters)} parameters",
                hint="give a smaller number, or --remove K",
            )
        return min(left, key=lambda k: (abs(left[k] - target), k))
    most_left = _most_left(sizes, budget)
    enough = [k for k in left if left[k] <= most_left]
    if not enough:
        raise _too_little(sizes, budget, min(left.values()))
    return min(enough)


def _most_left(sizes: Sizes, budget: Budget) -> float:
    """The most bytes, or seconds of a token, that `--bytes` or `--speedup` leave."""
    if budget.bytes is not None:
        return parse_size(budget.bytes, "--bytes")
    wanted = budget.speedup or 0.0
    if not (math.isfinite(wanted) and wanted >= 1):
        raise UsageError(f"--speedup {wanted}: expected a number of at least 1, such as 1.3")
    return sizes.all_seconds / wanted * (1 + 1e-12)


def _too_little(sizes: Sizes, budget: Budget, left: float) -> ShortstackError:
    """All blocks together do not keep a budget."""
    if budget.bytes is not None:
        return ShortstackError(
            f"--bytes {budget.bytes}: without all {counted(len(sizes.nbytes), 'removable block')} the weights of "
            f"{sizes.source} still take {size(int(left))}",
            hint=f"--bytes {-(-int(left) // 10**6)}MB or more, or quantize the pruned model",
        )
    speedup = sizes.all_seconds / max(left, 1e-12)
    return ShortstackError(
        f"--speedup {budget.speedup:g}: without all {counted(len(sizes.seconds), 'removable block')} {sizes.source} is "
        f"{speedup:.2f} times as fast here",
        hint=f"--speedup {math.floor(speedup * 100) / 100:g} or less",
    )


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
