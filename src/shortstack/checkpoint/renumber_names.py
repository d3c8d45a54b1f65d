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
# Between container and number, and behind it: `layers.3.`, `layers\.3\.`, `layers[.]3`, `layers/3`, `layers[3]`, `layer_3`.
_BETWEEN, _BEHIND = r"(?:\\\.|\[\.\]|[./_\[])", r"(?=$|[./_\]:,$)]|\\[.b]|\[\.\])"
# Parts of a composite whose blocks have numbers of their own.
_OTHER_TOWERS = re.compile(r"vision|visual|image|audio|speech|encoder|tower|mtp|draft|eagle|medusa")
METHODS = (
    "awq", "bitnet", "bitsandbytes", "compressed-tensors", "eetq", "fbgemm_fp8", "fp8", "gptq", "higgs", "hqq", "mxfp4",
    "quanto", "quark", "torchao",
)  # fmt: skip


class Renumbering:
    """Module names -> module names without the removed blocks; None for those that are removed.

    Args:
        anatomy: where the checkpoint keeps its blocks.
        kept: positions of the blocks that stay.
        place: where the names stand, for errors.
    """

    def __init__(self, anatomy: Anatomy, kept: Sequence[int], place: str) -> None:
        self._place = place
        self._new = {old: new for new, old in enumerate(kept)}
        container = anatomy.prefix.rstrip(".").rpartition(".")[2]  # `layers`, `h`, `blocks`
        plural = re.escape(container) + ("?" if container.endswith("s") else "")
        self._named = re.compile(rf"(?<![A-Za-z0-9]){plural}{_BETWEEN}(?P<number>\d+){_BEHIND}")
        self._towers = set(_OTHER_TOWERS.findall(anatomy.prefix))

    def __call__(self, name: str) -> str | None:
        """The new name, or None.

        Raises:
            ShortstackError: a pattern that names blocks in a way that cannot be renumbered.
        """
        match = self._match(name)
        rest = name
        if match:
            new = self._new.get(int(match.group("number")))
            if new is None:
                return None
            rest = name[: match.start("number")] + name[match.end("number") :]
            renumbered = f"{name[: match.start('number')]}{new}{name[match.end('number') :]}"
        else:
            renumbered = name
        is_pattern = self._is_pattern(name) or ("*" in name and match is None)
        if is_pattern and re.search(r"(?:\\\.|\.|\(|\[|\|)\d", rest):
            raise ShortstackError(
                f"{self._place} has the pattern {name!r}, which may name blocks by number",
                hint="replace it by module names, or prune the checkpoint before quantization",
            )
        return renumbered

    def number_of(self, name: str) -> int | None:
        """The block that a name names (its position), or None."""
        match = self._match(name)
        return int(match.group("number")) if match else None

    def must_stay(self, name: str) -> str:
        """The new name of a block that may not be removed.

        Raises:
            ShortstackError: it is removed.
        """
        renumbered = self(name)
        if renumbered is None:
            raise ShortstackError(f"{self._place} names {name!r}, a block that is removed", hint="keep that block")
        return renumbered

    def names_a_block(self, value: Any) -> bool:
        """Whether a name of a block stands anywhere in a value of JSON."""
        if isinstance(value, Mapping):
            return any(
                self.names_a_block(key) or (not _is_path(key, inner) and self.names_a_block(inner))
                for key, inner in value.items()
            )
        if isinstance(value, list):
            return any(self.names_a_block(part) for part in value)
        return isinstance(value, str) and self.number_of(value) is not None

    def _match(self, name: str) -> re.Match[str] | None:
        match = self._named.search(name)
        if match and set(_OTHER_TOWERS.findall(name[: match.start()])) - self._towers:
            return None
        return match

    @staticmethod
    def _is_pattern(name: str) -> bool:
        return name.startswith(_PATTERN_MARKS) or bool(_PATTERN_CHARACTERS & set(name))


def _is_path(key: str, value: Any) -> bool:
    """Whether an entry says where something lies: `/data/layers_4/model` is no name of a block."""
    return isinstance(value, str) and any(word in str(key) for word in ("path", "file", "url"))


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
            f"{place}: is quantized by {method!r}, which shortstack does not support",
            hint="prune the checkpoint before quantization, then quantize the result",
        )
    return moved_names(record, Renumbering(anatomy, kept, f"{place}: quantization_config"))


def moved_names(value: Any, renumber: Renumbering) -> Any:
    """A value of JSON in which every name of a block is renumbered, and dropped with its block as a key or in a list.

    Raises:
        ShortstackError: a name of a removed block stands where nothing can be dropped, or in a pattern.
    """
    if isinstance(value, Mapping):
        pairs = ((renumber(str(key)), inner) for key, inner in value.items())
        return {
            key: inner if _is_path(key, inner) else moved_names(inner, renumber)
            for key, inner in pairs
            if key is not None
        }
    if isinstance(value, list):
        if any(isinstance(item, str) for item in value):
            names = (renumber(item) if isinstance(item, str) else item for item in value)
            return [name for name in names if name is not None]
        return [moved_names(item, renumber) for item in value]
    return renumber.must_stay(value) if renumber.names_a_block(value) else value
