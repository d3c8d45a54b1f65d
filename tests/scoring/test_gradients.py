"""What a backward sweep keeps, computes again, and leaves out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests import pico
from tests.scoring.material import scored

Built = Callable[..., Path]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [0, 1, 3, 6])
def test_graphs_that_are_kept_give_the_same_gradients(
    built: Built, kept: int, stored: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resident, what autograd keeps of a forward is not computed again, for as many of the last blocks as fit; also where
    weights are converted to what is computed in."""
    from shortstack.engine import backward as graphs
    from shortstack.engine.block_model import Skeleton

    model, windows = built("llama", dtype=stored), pico.windows(5)
    expected = scored(model, windows, "taylor", memory="streamed")
    monkeypatch.setattr(graphs, "_measured", lambda run, _: (run(), 10))
    real, forwards = Skeleton.run_block, []
    monkeypatch.setattr(Skeleton, "run_block", lambda *a: forwards.append(torch.is_grad_enabled()) or real(*a))
    monkeypatch.setattr(graphs.Graphs, "__init__", _limited(graphs.Graphs.__init__, 10 * kept))
    found = scored(model, windows, "taylor", memory="resident")
    assert found.criteria == expected.criteria
    again = 6 - kept  # the first block's forward is thrown away where it turns out not to fit
    assert len(forwards) == 6 + again + (kept < 6)


def _limited(original: Callable[..., None], limit: int) -> Callable[..., None]:
    return lambda self, windows, limit_bytes, last: original(self, windows, limit_bytes=limit, last=last)


@pytest.mark.parametrize(("at_a_time", "forwards"), [(5, 1 + 5), (4, 2 * 6)])
def test_streamed_keeps_the_graph_of_the_last_block_where_it_is_one_batch(
    built: Built, at_a_time: int, forwards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backward sweep begins with that block, and holds a batch's graph anyway."""
    from shortstack.engine import block_model as skeleton

    windows = pico.windows(5)
    monkeypatch.setitem(skeleton.TOKENS_AT_A_TIME, "cpu", at_a_time * len(windows[0]))
    asked = _watched(monkeypatch)
    scored(built("llama"), windows, "taylor", memory="streamed")
    assert len([None for gradients, _ in asked if gradients]) == forwards


@pytest.mark.parametrize("memory", ["streamed", "resident"])
@pytest.mark.parametrize("candidates", [(0, 1, 2, 3, 4, 5), (2, 4, 5)])
def test_gradients_end_at_the_first_block_that_is_scored(
    built: Built, memory: str, candidates: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = _watched(monkeypatch)
    scored(built("llama"), pico.windows(2), "taylor", candidates=candidates, memory=memory)
    onwards = [wanted for gradients, wanted in asked if gradients]
    assert onwards.count(False) == 1
    assert onwards.count(True) == 5 - candidates[0]


def _watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """For each run of a block: whether its weights get gradients, and whether what goes into it does."""
    from shortstack.engine.block_model import Skeleton

    asked: list[tuple[bool, bool]] = []
    real = Skeleton.run_block

    def run(self: Skeleton, block: torch.nn.Module, hidden: torch.Tensor, call: object) -> torch.Tensor:
        asked.append((torch.is_grad_enabled(), hidden.requires_grad))
        return real(self, block, hidden, call)

    monkeypatch.setattr(Skeleton, "run_block", run)
    return asked


def test_kept_graphs_are_measured_without_the_weights(built: Built) -> None:
    from shortstack.engine.backward import _measured

    layer = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.SiLU(), torch.nn.Linear(32, 8))
    x = torch.randn(5, 8, requires_grad=True)
    result, taken = _measured(lambda: layer(x), dict(layer.named_parameters()))
    assert result.grad_fn is not None
    assert 5 * 8 * 4 + 5 * 32 * 4 <= taken <= 5 * 8 * 4 + 3 * 5 * 32 * 4
