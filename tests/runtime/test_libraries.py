"""transformers, imported as it is and made ready for threads."""

from __future__ import annotations

import subprocess
import sys

import pytest


def python(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


_CODE = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from shortstack.runtime.libraries import import_transformers

class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if args and isinstance(args[0], torch.Tensor):
            print(function.overloadpacket.__name__, str(args[0].dtype), args[0].numel())
        return function(*args, **(kwargs or {}))

with Seen():
    import_transformers()
from transformers.generation import candidate_generator
print(getattr(getattr(candidate_generator, "roc_curve", None), "__module__", "").partition(".")[0])
"""


@pytest.fixture(scope="module")
def printed() -> list[str]:
    """Calls on a tensor while transformers is imported in a process of its own; and where a function of sklearn is from."""
    return python(_CODE).splitlines()


def test_what_is_imported_is_what_the_libraries_hold(printed: list[str]) -> None:
    """What the command line leaves out in its own process a library call does not."""
    pytest.importorskip("sklearn")
    assert printed[-1] == "sklearn"


def test_vector_functions_are_called_once_on_one_number(printed: list[str]) -> None:
    """MKL may compute a share of a function's first call with low accuracy where two threads make that call. It takes two
    idle cores and luck to see it (about one process in six, rotary tables off by 1.5e-4), so what is tested is the cure."""
    for dtype in ("torch.float32", "torch.float64"):
        assert {f"{name} {dtype} 1" for name in ("cos", "sin", "exp", "log", "sqrt", "rsqrt", "tanh", "erf")} <= set(
            printed
        )
