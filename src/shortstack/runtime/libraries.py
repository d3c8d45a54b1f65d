"""Import the large libraries without what none of this needs: start-up is part of every run's time."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from types import ModuleType
from typing import Any

# What transformers takes of other libraries whenever a model is imported: a function for speculative decoding, one for
# finding objects in images, a class for masks that are compiled. They cost a second and half of all modules.
_LEFT_OUT = {
    "sklearn.metrics": "roc_curve",
    "scipy.optimize": "linear_sum_assignment",
    "torch._dynamo._trace_wrapped_higher_order_op": "TransformGetItemToIndex",
}

_VECTOR_FUNCTIONS = (
    "acos", "asin", "atan", "cos", "cosh", "erf", "erfc", "erfinv", "exp", "expm1", "log", "log10", "log1p", "log2",
    "rsqrt", "sin", "sinh", "sqrt", "tan", "tanh",
)  # fmt: skip


@functools.cache
def import_transformers() -> None:
    """Import torch and what all language models of transformers share; afterwards everything is as if it were whole.

    What is left out imports its library when it is called.
    """
    with _without_collection(), _stand_ins():
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


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Imports make a million objects and no garbage: to look for it again and again is a tenth of their time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    """Within, modules stand in for those that are left out, are installed, and are not imported yet."""
    for name, wanted in _LEFT_OUT.items():
        package = name.partition(".")[0]
        if name not in sys.modules and (package in sys.modules or find_spec(package) is not None):
            sys.modules[name] = _StandIn(name, wanted)
    try:
        yield
    finally:
        _forget_all()


def _forget_all() -> None:
    for name in _LEFT_OUT:
        if isinstance(sys.modules.get(name), _StandIn):
            del sys.modules[name]


class _StandIn(ModuleType):
    """Takes a module's place until something of it is needed, other than one thing to call later."""

    def __init__(self, name: str, wanted: str) -> None:
        super().__init__(name)
        setattr(self, wanted, lambda *args, **kwargs: getattr(self._real(), wanted)(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked of every module by what looks through all of them
            raise AttributeError(name)
        return getattr(self._real(), name)

    def _real(self) -> ModuleType:
        _forget_all()
        return importlib.import_module(self.__name__)
