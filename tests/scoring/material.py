"""Scores of a model on windows, and what they must equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shortstack.artifacts.scores import Scores
from shortstack.data.calibration import CalibrationSet
from shortstack.families.open_model import open_checkpoint
from shortstack.scoring.criteria import parse_criteria
from shortstack.scoring.score import score_windows
from tests import oracle

ALL = "ppl,taylor,magnitude"


def scored(model: Path, windows: list[list[int]], criteria: str = ALL, **options: Any) -> Scores:
    return score_windows(open_checkpoint(model), CalibrationSet(windows, {}), parse_criteria(criteria), **options)


def assert_equals_oracle(found: Scores, model: Path, windows: list[list[int]], rel: float = 1e-5) -> None:
    assert found.criteria["ppl"].scores == pytest.approx(oracle.ppl_without_each(model, windows), rel=rel)
    assert found.criteria["ppl"].dense_ppl == pytest.approx(oracle.dense_ppl(model, windows), rel=rel)
    for name, expected in (("taylor", oracle.taylor(model, windows)), ("magnitude", oracle.magnitude(model))):
        assert list(found.criteria[name].tensors.values()) == [
            pytest.approx(block, rel=rel, abs=1e-9) for block in expected
        ]
        assert found.criteria[name].scores == pytest.approx([sum(block.values()) for block in expected], rel=rel)
