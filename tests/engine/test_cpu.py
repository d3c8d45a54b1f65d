"""oneDNN instead of torch's own library for linear layers: the same products, the same gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from shortstack.engine import cpu as linear

pytestmark = pytest.mark.skipif(not linear._available(), reason="this build of torch has no oneDNN")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def always_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_onednn_is_faster", lambda *_: True)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7, 48), (2, 5, 48), (1, 1, 48)])
def test_equals_torch_with_gradients(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(48, 32, bias=bias)
    found, expected = [], []
    for results, inside in ((found, True), (expected, False)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
        layer.zero_grad()
        if inside:
            with linear.fast_linear(torch.float32, CPU, (32, 48)) as library:
                assert library == "onednn"
                y = layer(x)
                y.square().sum().backward()
        else:
            y = layer(x)
            y.square().sum().backward()
        results += [y.detach(), x.grad, layer.weight.grad, layer.bias.grad if bias else torch.zeros(1)]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_products_do_go_there(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = linear._product
    monkeypatch.setattr(linear, "_product", lambda *arguments: calls.append(1) or real(*arguments))
    with torch.no_grad(), linear.fast_linear(torch.float32, CPU, (32, 48)):
        torch.nn.Linear(48, 32)(torch.randn(3, 48))
        functional.linear(torch.randn(3, 48), torch.randn(8, 48))
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_stay_with_torch(dtype: torch.dtype) -> None:
    with linear.fast_linear(dtype, CPU, (32, 48)) as library:
        assert library == "torch"


def test_small_matrices_are_not_worth_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(linear, "_choices", {})
    monkeypatch.setattr(linear, "_measured_ratio", lambda *_: pytest.fail("measured"))
    assert not linear._onednn_is_faster(64, 64)
    monkeypatch.setattr(linear, "_measured_ratio", lambda *_: 2.0)
    assert linear._onednn_is_faster(1024, 1024)
    monkeypatch.setattr(linear, "_measured_ratio", lambda *_: 1.0)
    assert linear._onednn_is_faster(1024, 1024)  # measured once
    assert not linear._onednn_is_faster(1024, 2048)


def test_a_parameter_is_packed_at_its_third_batch_and_forgotten_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many batches go through one block; its packed weights must go when it goes."""
    monkeypatch.setattr(linear, "_WORTH_MEASURING", 1)
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
