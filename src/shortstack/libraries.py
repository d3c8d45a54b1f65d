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

# What transformers takes of other libraries, wherever they are installed, whenever a model is imported: one function for
# speculative decoding, one for finding objects in images. They cost a second and half of all modules.
_LEFT_OUT = {"sklearn.metrics": "roc_curve", "scipy.optimize": "linear_sum_assignment"}


@functools.cache
def import_transformers() -> None:
    """Import torch and what all language models of transformers share; afterwards everything is as if it were whole.

    The functions that are left out import their library when they are called.
    """
    with _without_collection(), _stand_ins():
        import transformers.generation.utils
        import transformers.loss.loss_utils
        import transformers.modeling_utils  # noqa: F401


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
    """Within, modules stand in for libraries that are installed and not imported yet."""
    packages = {name.partition(".")[0] for name in _LEFT_OUT}
    absent = [name for name in packages if name not in sys.modules and find_spec(name) is not None]
    stand_ins = {}
    for name in (*absent, *(module for module in _LEFT_OUT if module.partition(".")[0] in absent)):
        stand_ins[name] = _StandIn(name, _LEFT_OUT.get(name))
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            _forget(name)


def _forget(name: str) -> None:
    if isinstance(sys.modules.get(name), _StandIn):
        del sys.modules[name]


class _StandIn(ModuleType):
    """Takes a module's place until something of it is needed, other than one function to call later."""

    def __init__(self, name: str, function: str | None) -> None:
        super().__init__(name)
        self.__spec__ = find_spec(name.partition(".")[0])  # what asks whether the library is there is told the truth
        self.__path__: list[str] = []
        if function is not None:
            setattr(self, function, lambda *args, **kwargs: getattr(self._real(), function)(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked of every module by what looks through all of them
            raise AttributeError(name)
        return getattr(self._real(), name)

    def _real(self) -> ModuleType:
        for name in _LEFT_OUT:
            _forget(name)
            _forget(name.partition(".")[0])
        return importlib.import_module(self.__name__)
