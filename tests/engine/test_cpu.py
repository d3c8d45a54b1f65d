"""oneDNN instead of torch's own library for linear layers: the same products, the same gradients."""

from __future__ import annotations

import time
import timeit
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from shortstack.engine import cpu as linear
from shortstack.errors import ShortstackError, UsageError
from shortstack.runtime import devices
from shortstack.runtime.private_names import has_onednn

pytestmark = pytest.mark.skipif(not has_onednn(), reason="this build of torch has no oneDNN")
CPU = torch.device("cpu")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(48,), (7, 48), (2, 5, 48), (1, 1, 48)])
def test_equals_torch_with_gradients(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(48, 32, bias=bias)
    found, expected = [], []
    for results, inside in ((found, True), (expected, False)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
        layer.zero_grad()
        if inside:
            with linear.computing(torch.float32, CPU, "onednn") as library:
                assert library == "onednn"
                y = layer(x)
                y.square().sum().backward()
        else:
            y = layer(x)
            y.square().sum().backward()
        results += [y.detach(), x.grad, layer.weight.grad, layer.bias.grad if bias else torch.zeros(1)]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_what_comes_out_may_be_changed_in_place() -> None:
    """Gemma 3n scales what a linear layer gives."""
    layer, x = torch.nn.Linear(48, 32), torch.randn(2, 5, 48)
    with linear.computing(torch.float32, CPU, "onednn"):
        y = layer(x)
        y *= 3.0
        y.sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((32,), 30.0))


def test_products_do_go_there(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = linear.onednn_product
    monkeypatch.setattr(linear, "onednn_product", lambda *arguments: calls.append(1) or real(*arguments))
    with torch.no_grad(), linear.computing(torch.float32, CPU, "onednn"):
        torch.nn.Linear(48, 32)(torch.randn(3, 48))
        functional.linear(torch.randn(3, 48), torch.randn(8, 48))
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_stay_with_torch(dtype: torch.dtype) -> None:
    with linear.computing(dtype, CPU) as library:
        assert library == "torch"
    with (
        pytest.raises(UsageError, match="--cpu-kernels onednn: for float32 on a CPU, not for"),
        linear.computing(dtype, CPU, "onednn"),
    ):
        pass


def test_a_torch_without_its_products_multiplies_itself_unless_they_are_requested(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear, "cpu_maker", lambda: "AuthenticAMD")
    assert linear.library_for(torch.float32, CPU, "auto") == "onednn"
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    assert linear.library_for(torch.float32, CPU, "auto") == "torch"
    with pytest.raises(
        ShortstackError, match=r"has no ops\.mkldnn\._linear_pointwise, which --cpu-kernels onednn needs"
    ):
        linear.library_for(torch.float32, CPU, "onednn")


@pytest.mark.parametrize(("maker", "library"), [("AuthenticAMD", "onednn"), ("GenuineIntel", "torch"), ("", "torch")])
def test_the_maker_of_the_cpu_decides_and_nothing_is_measured(
    maker: str, library: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {maker}\n\nprocessor\t: 1\n" if maker else "")
    monkeypatch.setattr(devices, "_CPU", tmp_path / "cpuinfo")
    monkeypatch.setattr(devices, "_cpu", devices._cpu.__wrapped__)
    for module in (time, timeit):
        monkeypatch.setattr(module, "perf_counter", lambda: pytest.fail("a stopwatch"), raising=False)
    assert linear.library_for(torch.float32, CPU, "auto") == library
    assert linear.library_for(torch.float32, CPU, "torch") == "torch"
    assert linear.library_for(torch.float32, torch.device("cuda"), "auto") == "torch"


def test_what_belongs_to_the_process_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processors of a container's share, and no more, compute meanwhile."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(linear, "processors", lambda: 2)
    before = torch.get_num_threads()
    torch.set_num_threads(6)
    try:
        with linear.computing(torch.float64, CPU):
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 6
    finally:
        torch.set_num_threads(before)


def test_a_measurement_within_a_training_run_gives_its_library_back() -> None:
    with linear.computing(torch.float32, CPU, "onednn"):
        outer = linear._thread.mode
        with linear.computing(torch.float32, CPU, "torch"):
            assert linear._thread.mode is None
        assert linear._thread.mode is outer
    assert linear._thread.mode is None


def test_a_parameter_is_packed_at_its_third_batch_and_forgotten_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many batches go through one block; its packed weights must go when it goes."""
    monkeypatch.setattr(linear, "_WORTH_PACKING", range(1, 1 << 24))
    packed = []
    real = torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda *a: packed.append(1) or real(*a))
    layer = torch.nn.Linear(48, 32)
    x = torch.randn(3, 48)
    expected = layer(x).detach()
    with torch.no_grad():
        mode = linear._ThroughOneDNN()
        with mode:
            for _ in range(5):
                torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
            assert (len(packed), len(mode.packed)) == (1, 1)
            layer.weight = torch.nn.Parameter(2 * layer.weight)
            torch.testing.assert_close(layer(x) - layer.bias, 2 * (expected - layer.bias), rtol=1e-5, atol=1e-5)
            assert (len(packed), len(mode.packed)) == (1, 1)  # a weight that comes once or twice is not worth it
