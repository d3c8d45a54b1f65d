"""What the bytes of a stored tensor are to torch."""

from __future__ import annotations

import torch

from shortstack.checkpoint.headers import TensorInfo
from shortstack.errors import ShortstackError

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def from_bytes(raw: torch.Tensor, tensor: TensorInfo) -> torch.Tensor:
    """The tensor that these bytes hold; nothing is copied.

    Args:
        raw: `tensor.nbytes` of uint8, beginning where its dtype may (`begins_well`).
        tensor: what the file's header says of it.

    Raises:
        ShortstackError: it is stored in a precision that torch does not have.
    """
    if tensor.dtype not in _DTYPES:
        raise ShortstackError(
            f"{tensor.file}: {tensor.name} is stored as {tensor.dtype}, which cannot be computed with"
        )
    return raw.view(_DTYPES[tensor.dtype]).view(tensor.shape)


def begins_well(tensor: TensorInfo) -> bool:
    """Whether it lies in its file where torch can have it as it is: at a multiple of its numbers' size."""
    return tensor.dtype in _DTYPES and tensor.start % _DTYPES[tensor.dtype].itemsize == 0
