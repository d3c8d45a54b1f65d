"""On CUDA: the same scores as on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shortstack.data.calibration import CalibrationSet
from shortstack.families.open_model import open_checkpoint
from shortstack.scoring.criteria import parse_criteria
from shortstack.scoring.score import score_windows
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
            dtype="float32",
            memory=memory,  # type: ignore[arg-type]
        )
        for device in ("cpu", "cuda")
    ]
    for name in found[0].criteria:
        assert found[1].criteria[name].scores == pytest.approx(found[0].criteria[name].scores, rel=1e-4)


@pytest.mark.parametrize("memory", ["streamed", "resident"])
def test_bfloat16_by_default(built: Callable[..., Path], memory: str) -> None:
    checkpoint = open_checkpoint(built("llama"))
    windows = CalibrationSet(pico.windows(), {})
    found = score_windows(checkpoint, windows, parse_criteria("ppl"), device="cuda", memory=memory)  # type: ignore[arg-type]
    exact = score_windows(checkpoint, windows, parse_criteria("ppl"), device="cpu")
    assert found.settings["dtype"] == "bfloat16"
    assert found.criteria["ppl"].scores == pytest.approx(exact.criteria["ppl"].scores, rel=2e-2)


@pytest.mark.parametrize(("dtype", "rel"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_out_of_memory_goes_on_in_smaller_batches(
    built: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, dtype: str, rel: float
) -> None:
    from shortstack.engine.block_model import Skeleton

    checkpoint, windows = open_checkpoint(built("llama")), CalibrationSet(pico.windows(9), {})

    def run() -> tuple[float, ...]:
        found = score_windows(checkpoint, windows, parse_criteria("ppl"), device="cuda", dtype=dtype)  # type: ignore[arg-type]
        return found.criteria["ppl"].scores

    expected, real = run(), Skeleton.run_block

    def limited(self: Skeleton, block: torch.nn.Module, hidden: torch.Tensor, call: object) -> torch.Tensor:
        if len(hidden) > 2:
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
        return real(self, block, hidden, call)  # type: ignore[arg-type]

    monkeypatch.setattr(Skeleton, "run_block", limited)
    assert run() == pytest.approx(expected, rel=rel)
