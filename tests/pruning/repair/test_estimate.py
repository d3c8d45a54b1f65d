"""What a dry run tells of a repair."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from shortstack.checkpoint.forecast import COPIES, Forecast
from shortstack.families.open_model import open_checkpoint
from shortstack.pruning.estimate import estimate_prune
from shortstack.pruning.repair.estimate import estimate_repair


def test_pruning_that_repairs_computes_what_repairing_does(built: Callable[..., Path]) -> None:
    model = Forecast.of(open_checkpoint(built("llama")))
    choice = {"model": model, "blocks": "2,3"}
    alone = estimate_prune(choice)
    assert alone.untimed == COPIES
    assert alone.forecast is not None
    repaired = estimate_prune({**choice, "repair": "auto", "samples": 8, "seq_len": 16})
    by_itself = estimate_repair({"model": alone.forecast, "samples": 8, "seq_len": 16})
    assert (repaired.passes, repaired.untimed) == (by_itself.passes, "")
    # Two models, 10 windows, 4 blocks. Of two windows a quarter with twelve candidates and the rest with one of each method
    # through two blocks, then a quarter with four and the rest with one, through one block and none.
    assert repaired.passes[0].blocks == 16 * (2 * 10 * 4 + 2 * (5.25 * 2 + 1.75 * 1))
    assert repaired.passes[0].head == 16 * 2 * (2 + 5.25 + 2 * 1.75)
    searched = estimate_prune({"model": model, "selection": "greedy", "remove": 2, "repair": "auto"})
    assert len(searched.passes) == 2
