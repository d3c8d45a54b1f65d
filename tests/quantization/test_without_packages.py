"""Without llm-compressor, or without what loads its results: one line, with the command that installs it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from shortstack.cli.app import run
from shortstack.inspection.check import check


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    missing = ("llmcompressor", "compressed_tensors")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name in missing else real(name, *more))


@pytest.mark.usefixtures("bare")
def test_quantize(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["quantize", "embedded", "--out", str(tmp_path / "q")]) == 2
    expected = "error: quantize needs llmcompressor\nhint: pip install 'shortstack[quantize]'\n"
    assert capsys.readouterr().err == expected


@pytest.mark.usefixtures("bare")
def test_what_loads_a_result(copied: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = copied()
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "config_groups": {}}
    (model / "config.json").write_text(json.dumps(config))
    assert run(["eval", "ppl", str(model), "--seq-len", "32"]) == 2
    error = capsys.readouterr().err
    expected = (
        f"error: {model}: is quantized; loading it needs compressed_tensors\nhint: pip install compressed_tensors\n"
    )
    assert error.endswith(expected)
    loads = [finding for finding in check(str(model), quiet=True).findings if finding.what == "loads"]
    assert loads[0].status == "skip"
    assert "pip install compressed_tensors" in loads[0].says
