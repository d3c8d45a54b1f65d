"""On CUDA: the same scores as on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shortstack.calibration import CalibrationSet
from shortstack.checkpoint.reader import open_checkpoint
from shortstack.criteria import parse_criteria
from shortstack.scoring import score_windows
from tests import pico

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.parametrize("memory", ["streamed", "resident"])
def test_scores_equal_those_of_the_cpu(built: Callable[..., Path], memory: str) -> None:
    checkpoint = open_checkpoint(built("llama"))
    found = [
        score_windows(
            checkpoint,
            CalibrationSet(pico.windows(), {}),
            parse_criteria("ppl,taylor,magnitude"),
            device=device,
            memory=memory,  # type: ignore[arg-type]
        )
        for device in ("cpu", "cuda")
    ]
    for name in found[0].criteria:
        assert found[1].criteria[name].scores == pytest.approx(found[0].criteria[name].scores, rel=1e-4)
