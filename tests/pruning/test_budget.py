"""Every budget is turned into a number of blocks, and kept."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import shortstack
from shortstack.errors import ShortstackError, UsageError
from shortstack.families.open_model import open_checkpoint
from shortstack.pruning.block_seconds import block_seconds
from shortstack.pruning.budget import Sizes, amount_to_remove, ceiling_nll
from shortstack.pruning.options import SearchOptions
from tests import oracle, pico

Built = Callable[..., Path]
WINDOWS = pico.windows(6)
SIZES = Sizes("a model", [10, 20, 10], [40, 80, 40], 100, 400, [1.0, 2.0, 1.0], 8.0)


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"input_ids": window}) + "\n" for window in WINDOWS))
    return str(path)


def found(model: Path, data: str, **options: Any) -> Any:
    return shortstack.search(str(model), data=data, samples=3, seq_len=16, quiet=True, **options)


@pytest.mark.parametrize(
    ("budget", "blocks"),
    [
        ({"remove": 2}, 2),
        ({"ratio": 0.29}, 1),
        ({"ratio": 0.3}, 2),
        ({"params": "71"}, 2),
        ({"bytes": "400"}, 0),
        ({"bytes": "399"}, 1),
        ({"bytes": "280"}, 2),
        ({"bytes": "0.24kB"}, 3),
        ({"speedup": 1.0}, 0),
        ({"speedup": 1.1}, 1),
        ({"speedup": 1.6}, 2),
        ({"speedup": 2.0}, 3),
    ],
)
def test_numbers_of_blocks(budget: dict[str, Any], blocks: int) -> None:
    assert amount_to_remove(SIZES, SearchOptions(**budget)) == blocks


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        ({"bytes": "239"}, "without all 3 removable blocks the weights of a model still take 240 B"),
        ({"bytes": "large"}, "'large' is not a size"),
        ({"speedup": 2.1}, r"without all 3 removable blocks a model is 2.00 times as fast here"),
        ({"speedup": 0.9}, "expected a number of at least 1"),
        ({"speedup": math.nan}, "expected a number of at least 1"),
    ],
)
def test_what_no_number_of_blocks_keeps(budget: dict[str, Any], says: str) -> None:
    with pytest.raises(ShortstackError, match=says):
        amount_to_remove(SIZES, SearchOptions(**budget))


def test_ceilings() -> None:
    assert ceiling_nll("12.5", 1.0) == pytest.approx(math.log(12.5))
    assert ceiling_nll("1.2x", 2.0) == pytest.approx(2.0 + math.log(1.2))
    for text in ("0.9x", "x", "-3", "", "1.2 times"):
        with pytest.raises(UsageError, match="expected a perplexity"):
            ceiling_nll(text, 1.0)


def test_bytes_of_what_is_written(built: Built, data: str, tmp_path: Path) -> None:
    model = built("llama")
    whole, block = (
        open_checkpoint(model).nbytes,
        open_checkpoint(model).nbytes - _bytes_without(model, tmp_path / "one"),
    )
    target = whole - 2 * block
    made = shortstack.prune(
        str(model), selection="greedy", bytes=target, data=data, samples=3, seq_len=16, out=tmp_path / "p", quiet=True
    )
    assert len(made.plan.removed) == 2
    assert open_checkpoint(tmp_path / "p").nbytes == target
    scores = shortstack.score(str(model), criterion="magnitude", quiet=True)
    assert len(shortstack.plan(str(model), scores=scores, bytes=target - 1).removed) == 3


def _bytes_without(model: Path, out: Path) -> int:
    shortstack.prune(str(model), blocks="0", out=out, quiet=True)
    return open_checkpoint(out).nbytes


@pytest.mark.parametrize("selection", ["greedy", "one-shot", "contiguous", "beam:2", "evolution:2"])
def test_a_ceiling_is_kept_and_one_more_block_breaks_it(built: Built, data: str, selection: str) -> None:
    model = built("llama")
    costs = {k: _choosing_nll(model, found(model, data, remove=k, selection=selection).removed) for k in range(6)}
    for wanted in (1, 2, 3):
        between = (max(costs[k] for k in range(1, wanted + 1)) + 1e-4, costs[wanted + 1])
        ceiling = math.exp(between[0])
        made = found(model, data, ppl_ceiling=f"{ceiling:.6f}", selection=selection)
        assert _choosing_nll(model, made.removed) <= between[0]
        if between[0] < between[1]:
            assert len(made.removed) == wanted
        assert made.why["ppl_ceiling"] == f"{ceiling:.6f}"


@torch.no_grad()
def _choosing_nll(model: Path, removed: tuple[int, ...]) -> float:
    return float(oracle.mean_nll(oracle.bypassed(pico.load(model), set(removed)), WINDOWS[:3]).mean())


def test_a_ceiling_relative_to_the_dense_model(built: Built, data: str) -> None:
    model = built("llama")
    dense = _choosing_nll(model, ())
    relative = found(model, data, ppl_ceiling="1.5x")
    assert relative.removed == found(model, data, ppl_ceiling=f"{1.5 * math.exp(dense):.6f}").removed
    assert _choosing_nll(model, relative.removed) <= dense + math.log(1.5)


@pytest.mark.parametrize("selection", ["greedy", "one-shot", "contiguous", "evolution:2"])
def test_a_ceiling_that_no_set_keeps(built: Built, data: str, selection: str) -> None:
    with pytest.raises(
        ShortstackError, match=r"no set of blocks of .* has a perplexity of at most 2 \(the dense model's is"
    ):
        found(built("llama"), data, ppl_ceiling="2", selection=selection)


def test_plan_has_no_sets_to_measure(built: Built) -> None:
    model = built("llama")
    scores = shortstack.score(str(model), criterion="magnitude", quiet=True)
    with pytest.raises(UsageError, match="scores do not measure the perplexity of a set of blocks"):
        shortstack.plan(str(model), scores=scores, ppl_ceiling="1.2x")


def test_a_speed_that_is_measured(built: Built, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The times are a machine's; what follows from them is not."""
    from shortstack.engine.streamed import StreamedModel

    monkeypatch.setattr(StreamedModel, "token_seconds", lambda _: ([0.1] * 6, 0.4))
    model = built("llama")
    made = found(model, data, speedup=1.25)
    assert len(made.removed) == 2
    assert made.why["speedup"]["expected"] == pytest.approx(1.25)
    scores = shortstack.score(str(model), criterion="magnitude", quiet=True)
    planned = shortstack.plan(str(model), scores=scores, speedup=1.3)
    assert len(planned.removed) == 3
    assert planned.why["speedup"]["expected"] == pytest.approx(1.0 / 0.7)
    with pytest.raises(ShortstackError, match="only 5 of 6 are removable"):
        shortstack.plan(str(model), scores=scores, speedup=2.4)


@pytest.mark.parametrize("whole", [False, True])
def test_times_of_blocks_are_measured(built: Built, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block by block, and in a model that is held whole: each block takes some time, and so does the rest."""
    checkpoint = open_checkpoint(built("llama"))
    if whole:
        from shortstack.engine import select

        monkeypatch.setattr(select, "_streamed", _not_separable)
    times = block_seconds(checkpoint)
    assert len(times.blocks) == 6
    assert all(seconds > 0 for seconds in times.blocks)
    assert times.outside > 0
    assert times.dtype == "float32"


def _not_separable(checkpoint: Any, *_: Any) -> Any:
    from shortstack.engine.block_model import NotSeparableError

    raise NotSeparableError(checkpoint.source, "for a test")


def test_dry_runs_measure_nothing(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    from shortstack.checkpoint.forecast import Forecast
    from shortstack.engine.streamed import StreamedModel
    from shortstack.pruning.estimate import estimate_plan, estimate_prune, estimate_search

    monkeypatch.setattr(StreamedModel, "token_seconds", lambda _: 1 / 0)
    model = Forecast.of(open_checkpoint(built("llama")))
    scores = shortstack.score(str(built("llama")), criterion="magnitude", quiet=True)
    assert estimate_plan({"model": model, "scores": scores, "speedup": 1.2}).forecast is None
    assert estimate_search({"model": model, "selection": "greedy", "ppl_ceiling": "1.2x"}).forecast is None
    small = estimate_prune({"model": model, "selection": "greedy", "bytes": str(model.nbytes - 1)})
    assert small.forecast is not None
    assert len(small.forecast.kept) == 5
