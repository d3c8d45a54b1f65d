"""What is left out when transformers is imported, and that nobody notices."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import pico


def python(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_scoring_imports_no_statistics(built: Callable[..., Path], tmp_path: Path) -> None:
    """sklearn, scipy and pandas are a second of every start, wherever they are installed."""
    rows = [json.dumps({"input_ids": window}) + "\n" for window in pico.windows()]
    (tmp_path / "w.jsonl").write_text("".join(rows))
    code = (
        "import sys; from shortstack.cli.app import run\n"
        "assert run(['score', sys.argv[1], '--data', sys.argv[2], '--criterion', 'ppl,taylor', '--samples', '2', "
        "'--seq-len', '16', '--quiet']) == 0\n"
        "print([name for name in ('sklearn', 'scipy', 'pandas', 'datasets', 'matplotlib') if name in sys.modules])"
    )
    assert python(code, str(built("llama")), str(tmp_path / "w.jsonl")).splitlines()[-1] == "[]"


def test_what_was_left_out_is_there_when_it_is_needed() -> None:
    pytest.importorskip("sklearn")
    code = (
        "import sys; from shortstack.runtime.libraries import import_transformers; import_transformers()\n"
        "assert not {'sklearn', 'scipy'} & set(sys.modules)\n"
        "from transformers.generation import candidate_generator\n"
        "from transformers.utils import is_sklearn_available\n"
        "assert is_sklearn_available()\n"
        "print(candidate_generator.roc_curve([0, 1], [0.2, 0.9])[0].tolist())\n"
        "import sklearn.metrics, scipy.stats; print(sklearn.metrics.roc_curve([0, 1], [0.2, 0.9])[1].tolist())"
    )
    assert python(code).splitlines() == ["[0.0, 0.0, 1.0]", "[0.0, 1.0, 1.0]"]


def test_a_library_that_is_imported_already_stays() -> None:
    pytest.importorskip("sklearn")
    code = (
        "import sklearn.metrics; from shortstack.runtime.libraries import import_transformers; import_transformers()\n"
        "import sys; print(sys.modules['sklearn.metrics'] is sklearn.metrics, sklearn.metrics.__file__ is not None)"
    )
    assert python(code) == "True True"


def test_vector_functions_are_called_once_on_one_number() -> None:
    """MKL may compute a share of a function's first call with low accuracy where two threads make that call. It takes two
    idle cores and luck to see it (about one process in six, rotary tables off by 1.5e-4), so what is tested is the cure."""
    code = (
        "import torch; from torch.utils._python_dispatch import TorchDispatchMode\n"
        "from shortstack.runtime.libraries import import_transformers\n"
        "class Seen(TorchDispatchMode):\n"
        "    def __torch_dispatch__(self, function, types, args=(), kwargs=None):\n"
        "        if args and isinstance(args[0], torch.Tensor):\n"
        "            print(function.overloadpacket.__name__, str(args[0].dtype), args[0].numel())\n"
        "        return function(*args, **(kwargs or {}))\n"
        "with Seen(): import_transformers()"
    )
    seen = python(code).splitlines()
    for dtype in ("torch.float32", "torch.float64"):
        assert {f"{name} {dtype} 1" for name in ("cos", "sin", "exp", "log", "sqrt", "rsqrt", "tanh", "erf")} <= set(
            seen
        )
