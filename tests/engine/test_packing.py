"""MKL's own order of weights: the same products, for the batches that were announced and for no others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional

from shortstack.engine import linear
from shortstack.engine.workers import workers

pytestmark = pytest.mark.skipif(not linear._mkl_packs(), reason="this build of torch has no MKL")
CPU = torch.device("cpu")


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The rows that weights were packed for, within `fast_linear` where oneDNN is not faster."""
    monkeypatch.setattr(linear, "_onednn_is_faster", lambda *_: False)
    monkeypatch.setattr(linear, "_WORTH_MEASURING", 1)
    found: list[int] = []
    real = torch.ops.mkl._mkl_reorder_linear_weight

    def reorder(weight: torch.Tensor, rows: int) -> torch.Tensor:
        found.append(rows)
        arranged: torch.Tensor = real(weight, rows)
        return arranged

    monkeypatch.setattr(torch.ops.mkl, "_mkl_reorder_linear_weight", reorder)
    with linear.fast_linear(torch.float32, CPU, (32, 48), announced=True) as library:
        assert library == "torch"
        yield found


@pytest.mark.parametrize("bias", [False, True])
def test_products_are_the_same(packed: list[int], bias: bool) -> None:
    layer = torch.nn.Linear(48, 32, bias=bias)
    x = torch.randn(3, 5, 48)
    with torch.no_grad():
        expected = x @ layer.weight.T + (layer.bias if bias else 0)
        linear.batches(8, rows=15)
        for _ in range(3):
            torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert packed == [15]


def test_what_was_not_announced_goes_the_usual_way(packed: list[int]) -> None:
    """Other rows, few batches, gradients, weights that are no parameters, other precisions."""
    layer, x = torch.nn.Linear(48, 32), torch.randn(15, 48)
    linear.batches(8, rows=15)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        layer(x[:7])
        functional.linear(x, layer.weight.detach().clone())
        torch.nn.Linear(48, 32, dtype=torch.bfloat16)(x.bfloat16())
        linear.batches(7, rows=15)
        layer(x)
    assert packed == []


def test_a_weight_that_goes_takes_what_was_packed_with_it(packed: list[int]) -> None:
    layer, x = torch.nn.Linear(48, 32, bias=False), torch.randn(15, 48)
    linear.batches(8, rows=15)
    with torch.no_grad():
        once = layer(x)
        layer.weight = torch.nn.Parameter(2 * layer.weight)
        torch.testing.assert_close(layer(x), 2 * once, rtol=1e-5, atol=1e-5)
    mode = linear._entered[-1]
    assert isinstance(mode, linear._PackedForMKL)
    assert (packed, len(mode.shared.packed)) == ([15, 15], 1)


def test_threads_share_what_one_has_packed(packed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    layer, x = torch.nn.Linear(48, 32), torch.randn(15, 48)
    with workers(CPU) as side_by_side:
        linear.batches(8, rows=15)
        results = side_by_side(layer, [x] * 8)
    assert all(torch.equal(result, results[0]) for result in results)
    assert packed == [15]


def test_without_announcements_nothing_is_in_the_way() -> None:
    with linear.fast_linear(torch.float32, CPU, (32, 48), chosen="torch"):
        assert linear._entered == []
