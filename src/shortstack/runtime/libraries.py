"""Import the large libraries, ready for threads."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager

# What is put around the import: the command line's own process, and nobody else, has something (cli/quick_start.py).
importing: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext

_VECTOR_FUNCTIONS = (
    "acos", "asin", "atan", "cos", "cosh", "erf", "erfc", "erfinv", "exp", "expm1", "log", "log10", "log1p", "log2",
    "rsqrt", "sin", "sinh", "sqrt", "tan", "tanh",
)  # fmt: skip


@functools.cache
def import_transformers() -> None:
    """Import torch and what all language models of transformers share."""
    with importing():
        import transformers.generation.utils
        import transformers.loss.loss_utils
        import transformers.modeling_utils  # noqa: F401
    _settle_vector_functions()


def _settle_vector_functions() -> None:
    """Call once, on one number, the functions that torch hands to MKL: from one thread.

    MKL looks for the right kernel when a function is first called. Where two threads do that at once one of them may
    compute its share with a kernel of low accuracy, that one time (pytorch issue 188792): rotary tables off by 1e-4.
    """
    import torch

    for dtype in (torch.float32, torch.float64):
        number = torch.full((1,), 0.5, dtype=dtype)
        for name in _VECTOR_FUNCTIONS:
            getattr(number, name)()
