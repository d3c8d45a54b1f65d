"""The arithmetic of repairs, on tensors alone."""

from __future__ import annotations

import pytest
import torch

from shortstack.pruning.repair.fit import Sums, linear_map


def made(tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(left, target, features) of so many tokens, of which the target is nearly linear in both."""
    generator = torch.Generator().manual_seed(0)
    left, features = (torch.randn(tokens, size, generator=generator, dtype=torch.float64) for size in (6, 9))
    target = 1.2 * (left + features @ torch.randn(9, 6, generator=generator, dtype=torch.float64))
    return left.to(dtype), target.to(dtype), features.to(dtype)


@pytest.mark.parametrize(("dtype", "apart"), [(torch.float64, 1e-12), (torch.float32, 3e-6), (torch.bfloat16, 3e-6)])
def test_sums_are_those_of_all_tokens_whatever_the_slices(dtype: torch.dtype, apart: float) -> None:
    left, target, features = made(2500, dtype)
    sums = Sums()
    for part in (slice(0, 40), slice(40, 2500)):
        sums.add(left[part], target[part], {"inner": features[part], "moved": features[part]})
    wide = features.double()
    expected = {
        "gram_FF": wide.T @ wide, "lacking_FD": wide.T @ (target.double() - left.double()), "left_FD": wide.T @ left.double(),
        "total_F": wide.sum(dim=0),
    }  # fmt: skip
    for name, value in expected.items():
        given = getattr(sums.of["inner"], name)
        assert given.dtype == torch.float64
        assert float((given - value).norm()) <= apart * float(value.norm()), name
    assert not sums.of["moved"].left_FD.any()  # no number for the states goes with it


@pytest.mark.parametrize("scaled", [True, False])
def test_a_map_and_a_number_are_found_where_they_are_there(scaled: bool) -> None:
    left, target, features = made(2500, torch.float64)
    sums = Sums(scaled=scaled)
    sums.add(left, target, {"inner": features})
    found = linear_map(sums, "inner", 1e-9, offset=False, scaled=scaled)
    assert found.factor == pytest.approx(1.2 if scaled else 1.0, rel=1e-6)
    assert torch.allclose(found(left, features), target, rtol=1e-5, atol=1e-5) is scaled
