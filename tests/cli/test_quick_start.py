"""What is left out when the command line imports transformers, and that nobody notices."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import pico
from tests.runtime.test_libraries import python

QUICK = (
    "import sys; from shortstack.cli import quick_start; from shortstack.runtime import libraries\n"
    "libraries.importing = quick_start.importing; libraries.import_transformers()\n"
)


def test_scoring_imports_no_statistics(built: Callable[..., Path], tmp_path: Path) -> None:
    """sklearn, scipy and pandas are a second of every start, wherever they are installed."""
    rows = [json.dumps({"input_ids": window}) + "\n" for window in pico.windows()]
    (tmp_path / "w.jsonl").write_text("".join(rows))
    code = (
        "import sys; from shortstack.__main__ import main\n"
        "sys.argv[1:] = ['score', sys.argv[1], '--data', sys.argv[2], '--criterion', 'ppl,taylor', '--samples', '2', "
        "'--seq-len', '16', '--quiet']\n"
        "try:\n    main()\n"
        "except SystemExit as ended:\n    assert ended.code == 0\n"
        "print([name for name in ('sklearn', 'scipy', 'pandas', 'datasets', 'matplotlib') if name in sys.modules])"
    )
    assert python(code, str(built("llama")), str(tmp_path / "w.jsonl")).splitlines()[-1] == "[]"


def test_what_was_left_out_is_there_when_it_is_needed() -> None:
    pytest.importorskip("sklearn")
    code = QUICK + (
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
        f"import sklearn.metrics\n{QUICK}"
        "print(sys.modules['sklearn.metrics'] is sklearn.metrics, sklearn.metrics.__file__ is not None)"
    )
    assert python(code) == "True True"
