"""Devices by name: what `auto` takes, the nearest of what does not exist, and Macs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import shortstack
from shortstack.errors import ShortstackError
from shortstack.runtime import devices
from shortstack.runtime.devices import exact_place, pick_device, pick_dtype


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Mac with its GPU, as far as it is asked: tensors are not really put there."""
    real = torch.empty

    def empty(*size: Any, device: Any = None, **more: Any) -> torch.Tensor:
        return real(*size, device="cpu" if str(device) == "mps" else device, **more)

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "empty", empty)
    devices._say_unmeasured.cache_clear()
    yield
    devices._say_unmeasured.cache_clear()


def test_auto_takes_the_gpu_of_a_mac_and_says_once_that_it_is_not_measured(
    mac: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [pick_device(name).type for name in ("auto", "mps", "cpu")] == ["mps", "mps", "cpu"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("device mps: ")
    assert "tested only on CPUs and CUDA" in lines[0]


def test_auto_prefers_cuda(mac: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device=None: real(*size))
    assert pick_device("auto").type == "cuda"


def test_without_a_gpu_auto_is_the_cpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto").type == "cpu"
    assert capsys.readouterr().err == ""
    with pytest.raises(ShortstackError, match="^--device mps: not usable here") as caught:
        pick_device("mps")
    assert caught.value.hint == "--device cpu"


@pytest.mark.parametrize(
    ("name", "nearest"), [("gpu", "cuda"), ("gpu:0", "cuda"), ("cdua", "cuda"), ("CUDA", "cuda"), ("msp", "mps")]
)
def test_the_nearest_device(name: str, nearest: str) -> None:
    with pytest.raises(ShortstackError) as caught:
        pick_device(name)
    assert caught.value.hint == f"did you mean {nearest}?"


def test_a_gpu_on_a_mac_is_mps(mac: None) -> None:
    with pytest.raises(ShortstackError, match="did you mean mps"):
        pick_device("gpu")


def test_dtypes_of_a_mac() -> None:
    mps = torch.device("mps")
    assert pick_dtype("auto", "BF16", mps) == torch.bfloat16
    with pytest.raises(ShortstackError, match="--dtype float64: not supported on mps"):
        pick_dtype("float64", "BF16", mps)


def test_doctor_names_the_gpu_of_a_mac(mac: None) -> None:
    text = shortstack.doctor().to_text()
    assert any("mps" in line and "not tested" in line for line in text.splitlines())


def test_float64_is_computed_where_there_is_one() -> None:
    """Apple's GPU has no float64: a tensor there must be brought to the CPU before it is made one."""

    class OnMac:
        device = torch.device("mps")

        def cpu(self) -> str:
            return "on the CPU"

    assert exact_place(OnMac()) == "on the CPU"  # type: ignore[comparison-overlap, arg-type]
    here = torch.ones(2)
    assert exact_place(here) is here
    found = [
        f"{path}: {ast.unparse(node)}"
        for path in Path(devices.__file__).parents[1].rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "double"
        if "exact_place" not in ast.unparse(node.func.value) and "_parts" not in ast.unparse(node.func.value)
    ]
    # What is left runs behind exact_place in the same function.
    assert [one for one in found if "powered.double()" not in one] == []


def test_quantization_does_not_run_there(mac: None, tmp_path: Path) -> None:
    from shortstack.quantization.quantize import _refuse_device
    from shortstack.quantization.schemes import scheme_named

    with pytest.raises(ShortstackError, match="--device mps: quantization runs on CUDA or a CPU"):
        _refuse_device(scheme_named("W4A16"), "mps")
    _refuse_device(scheme_named("FP8_DYNAMIC"), "auto")  # on the CPU, which has these numbers
