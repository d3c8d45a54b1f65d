"""Names and patterns of modules that hold block numbers, in the configs of quantization and of adapters.

A block's quantized tensors (packed weights, scales, zero points, group indices) stand under the block's own name, so
that they move together. What else may name a block is in `quantization_config`: plain module names, or patterns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from shortstack.checkpoint.anatomy import Anatomy
from shortstack.errors import ShortstackError

_PATTERN_MARKS = ("re:", "+:", "-:")
_PATTERN_CHARACTERS = set("\\^$+?{}[]()|")
METHODS = (
    "awq", "bitnet", "bitsandbytes", "compressed-tensors", "eetq", "fbgemm_fp8", "fp8", "gptq", "higgs", "hqq", "mxfp4",
    "quanto", "quark", "torchao",
)  # fmt: skip


class Renumbering:
    """Module names as they stand -> as they stand without the removed blocks; None for those that go.

    Args:
        anatomy: where the checkpoint keeps its blocks.
        kept: positions of the blocks that stay.
        place: where the names stand, for errors.
    """

    def __init__(self, anatomy: Anatomy, kept: Sequence[int], place: str) -> None:
        self._place = place
        self._new = {old: new for new, old in enumerate(kept)}
        container = anatomy.prefix.rstrip(".").rpartition(".")[2]  # `layers`, `h`, `blocks`
        self._named = re.compile(
            rf"(?P<before>(?:^|[.:/*]){re.escape(container)}(?:\\\.|\.))(?P<number>\d+)(?=$|\\|\.|/)"
        )

    def __call__(self, name: str) -> str | None:
        """The new name, or None.

        Raises:
            ShortstackError: a pattern that names blocks in a way that cannot be renumbered.
        """
        match = self._named.search(name)
        rest = name
        if match:
            new = self._new.get(int(match.group("number")))
            if new is None:
                return None
            rest = name[: match.start("number")] + name[match.end("number") :]
            renumbered = f"{name[: match.start('number')]}{new}{name[match.end('number') :]}"
        else:
            renumbered = name
        if self._is_pattern(name) and re.search(r"(?:\\\.|\.|\(|\[|\|)\d", rest):
            raise ShortstackError(
                f"{self._place} has the pattern {name!r}, which may name blocks by number",
                hint="replace it by module names, or go back to what it was made from",
            )
        return renumbered

    def number_of(self, name: str) -> int | None:
        """The block that a name names (its position), or None."""
        match = self._named.search(name)
        return int(match.group("number")) if match else None

    @staticmethod
    def _is_pattern(name: str) -> bool:
        return name.startswith(_PATTERN_MARKS) or bool(_PATTERN_CHARACTERS & set(name))


def renumbered(numbers: Sequence[int], kept: Sequence[int], base: int = 0) -> list[int]:
    """Block numbers (counted from `base`) of the blocks that stay, as they are numbered afterwards."""
    place = {old: new for new, old in enumerate(kept)}
    return [place[number - base] + base for number in numbers if number - base in place]


def renumbered_quantization(record: Any, anatomy: Anatomy, kept: Sequence[int], place: str) -> Any:
    """`quantization_config` for the blocks that stay: every module name in it renumbered, or dropped with its block.

    Raises:
        ShortstackError: an unknown method, or a pattern that names blocks in a way that cannot be renumbered.
    """
    if not isinstance(record, Mapping):
        raise ShortstackError(f"{place}: config.json: quantization_config is not an object")
    method = record.get("quant_method", "bitsandbytes" if "load_in_4bit" in record else None)
    if method not in METHODS:
        raise ShortstackError(
            f"{place}: is quantized by {method!r}, which shortstack does not know",
            hint="prune the checkpoint it was made from, then quantize that",
        )
    return _moved(record, Renumbering(anatomy, kept, f"{place}: quantization_config"))


def _moved(value: Any, renumber: Renumbering) -> Any:
    if isinstance(value, Mapping):
        pairs = ((renumber(str(key)), inner) for key, inner in value.items())
        return {key: _moved(inner, renumber) for key, inner in pairs if key is not None}
    if isinstance(value, list):
        if any(isinstance(item, str) for item in value):
            names = (renumber(item) if isinstance(item, str) else item for item in value)
            return [name for name in names if name is not None]
        return [_moved(item, renumber) for item in value]
    return value
