"""Sampling: what is asked of a model is what is done."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shortstack.errors import UsageError
from shortstack.evaluation.samples import SampleRequest, evaluate_samples


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"temperature": -1.0}, "temperature=-1.0: expected a number from 0 up"),
        ({"temperature": math.nan}, "temperature=.nan.: expected"),
        ({"top_p": 0.0}, "top_p=0.0: expected a share above 0"),
        ({"count": 0}, "count=0: expected at least 1"),
        ({"temperature": 0, "top_k": 3}, "top_k=3: no effect with temperature=0"),
        ({"temperature": 0, "count": 3}, "count=3: no effect with temperature=0"),
    ],
    ids=str,
)
def test_numbers_out_of_range_and_options_without_effect(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        SampleRequest(**given)


def test_without_temperature_there_is_one_continuation_and_the_record_says_so(built: Callable[..., Path]) -> None:
    (found,) = evaluate_samples(str(built("llama")), prompt="ab", new_tokens=3, temperature=0, quiet=True).results
    assert len(found.per_item["texts"]) == 1
    assert found.settings["count"] == 1
