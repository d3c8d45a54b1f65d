"""How many of the model's weights a stored tensor of a quantized checkpoint holds: several to a number, or none (scales)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shortstack.checkpoint.headers import DTYPE_BITS, TensorInfo
from shortstack.common.json_fields import nested

_PACKED = ("weight_packed", "qweight")
# What the packed weights are multiplied with, shifted by or found by.
_BESIDE = {
    "weight_scale", "weight_scale_inv", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale",
    "input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point", "k_scale", "v_scale",
    "scales", "qzeros", "g_idx",
}  # fmt: skip


def weights_in(tensor: TensorInfo, quantization: Any) -> int:
    """How many weights of the model a tensor holds.

    Args:
        tensor: of a checkpoint.
        quantization: the `quantization_config` of its config.json; None where there is none.
    """
    if not isinstance(quantization, Mapping):
        return tensor.numel
    last = tensor.name.rpartition(".")[2]
    if last in _BESIDE:
        return 0
    bits = _bits(quantization)
    return tensor.numel * (DTYPE_BITS[tensor.dtype] // bits) if last in _PACKED and bits else tensor.numel


def _bits(quantization: Mapping[str, Any]) -> int | None:
    """Bits of a packed weight; None where the config does not say it, or says several."""
    groups = nested(quantization, "config_groups")
    found = [nested(group, "weights", "num_bits") for group in groups.values()] if isinstance(groups, Mapping) else []
    found = found or [quantization.get("bits"), quantization.get("w_bit")]
    whole = {bits for bits in found if type(bits) is int and 1 <= bits <= 16}
    return whole.pop() if len(whole) == 1 else None
