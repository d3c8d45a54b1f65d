"""Checkpoints that are quantized already: their ignore lists hold block numbers, which must move with the blocks.

A block's quantized tensors (packed weights, scales, zero points, group indices) stand under the block's own name, so
that they move together. What else may name a block is in `quantization_config`: plain module names, or patterns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shortstack.checkpoint.anatomy import Anatomy
from shortstack.checkpoint.renumber_names import Renumbering
from shortstack.errors import ShortstackError

METHODS = (
    "awq", "bitnet", "bitsandbytes", "compressed-tensors", "eetq", "fbgemm_fp8", "fp8", "gptq", "higgs", "hqq", "mxfp4",
    "quanto", "quark", "torchao",
)  # fmt: skip


def shortened(record: Any, anatomy: Anatomy, kept: Sequence[int], place: str) -> Any:
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
