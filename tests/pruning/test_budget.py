"""Every budget is turned into a number of blocks, and kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import shortstack
from shortstack.artifacts.results import Figure, Result, Results, load_results
from shortstack.errors import ShortstackError, UsageError
from shortstack.families.open_model import open_checkpoint
from shortstack.pruning.block_seconds import benched_seconds, block_seconds
from shortstack.pruning.budget import Sizes, amount_of_sets, amount_to_remove, ceiling_nll, sizes_of
from shortstack.pruning.options import SearchOptions
from tests import oracle, pico

Built = Callable[..., Path]
WINDOWS = pico.windows(6)
SIZES = Sizes("a model", [10, 20, 10], [40, 80, 40], 100, 400, [1.0, 2.0, 1.0], 8.0)


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


UNEVEN = {"decoder_sparse_step": 1, "mlp_only_layers": [1, 4], "num_experts": 8, "num_experts_per_tok": 2,
          "moe_intermediate_size": 48, "norm_topk_prob": True}  # fmt: skip


@pytest.fixture
def uneven(built: Built) -> Path:
    """Blocks 1 and 4 have one MLP, the others eight experts."""
    model = built("qwen3_moe", **UNEVEN)
    assert len(set(open_checkpoint(model).block_parameters())) == 2
    return model


def _without(model: Path, removed: tuple[int, ...]) -> dict[str, int]:
    checkpoint = open_checkpoint(model)
    own = sizes_of(checkpoint, removed)
    return {
        "bytes": own.all_nbytes - sum(own.nbytes),
        "params": own.all_parameters - sum(own.parameters),
    }


@pytest.mark.fault(150)
@pytest.mark.parametrize("selection", ["greedy", "contiguous", "one-shot"])
def test_the_set_that_a_search_chooses_keeps_the_budget(uneven: Path, data: str, selection: str) -> None:
    """Not the set that one-shot scores would have taken: where blocks differ in size that may be another number of them."""
    by_number = {k: found(uneven, data, remove=k, selection=selection).removed for k in range(1, 6)}
    left = {k: _without(uneven, removed)["bytes"] for k, removed in by_number.items()}
    for target in sorted({*left.values(), *(one - 1 for one in left.values())})[1:]:
        removed = found(uneven, data, bytes=str(target), selection=selection).removed
        assert _without(uneven, removed)["bytes"] <= target
        fewest = min(k for k in left if left[k] <= target)
        assert removed == by_number[fewest]


def test_sets_of_each_number_are_chosen_only_where_blocks_differ(built: Built, uneven: Path) -> None:
    asked: list[int] = []

    def set_of(number: int) -> range:
        asked.append(number)
        return range(number)

    for model in (built("llama"), uneven):
        checkpoint = open_checkpoint(model)
        target = checkpoint.nbytes - sum(sizes_of(checkpoint, [0, 1, 2]).nbytes)
        number = amount_of_sets(checkpoint, range(6), SearchOptions(bytes=str(target)), set_of)
        assert (number, asked) == ((3, []) if model == built("llama") else (3, [3]))


def test_shares_and_parameters_are_those_of_the_set(uneven: Path) -> None:
    checkpoint, orders = open_checkpoint(uneven), ([1, 4, 0, 2, 3, 5], [0, 2, 1, 4, 3, 5], [5, 3, 2, 0, 4, 1])
    sizes, whole = checkpoint.block_parameters(), checkpoint.parameters()
    for order in orders:
        taken = [sum(sizes[place] for place in order[:k]) for k in range(7)]
        for k in range(1, 6):

            def amount(budget: dict[str, Any], order: list[int] = order) -> int:
                return amount_of_sets(checkpoint, range(6), SearchOptions(**budget), lambda number: order[:number])

            assert amount({"ratio": taken[k] / whole}) == k
            assert amount({"ratio": taken[k] / whole - 1e-6}) == k - 1
            assert amount({"params": str(whole - taken[k])}) == k


def test_a_number_of_which_no_set_can_go_is_skipped(uneven: Path) -> None:
    checkpoint = open_checkpoint(uneven)
    small, large = checkpoint.block_parameters()[1], checkpoint.block_parameters()[0]
    order = [1, 0, 4, 2, 3, 5]

    def set_of(number: int) -> list[int]:
        if number == 2:
            raise ShortstackError("none of two")
        return order[:number]

    share = (small + large) / checkpoint.parameters()
    assert amount_of_sets(checkpoint, range(6), SearchOptions(ratio=share), set_of) == 1
    target = checkpoint.nbytes - sum(sizes_of(checkpoint, [1, 0]).nbytes)
    assert amount_of_sets(checkpoint, range(6), SearchOptions(bytes=str(target)), set_of) == 3


def test_where_no_set_keeps_a_ratio_the_search_is_asked_for_the_number_that_could(uneven: Path) -> None:
    checkpoint = open_checkpoint(uneven)
    sizes = checkpoint.block_parameters()
    large_first = sorted(range(6), key=sizes.__getitem__, reverse=True)

    def set_of(number: int) -> list[int]:
        if number == 1:
            raise ShortstackError("none of one")
        return large_first[:number]

    share = max(sizes) / checkpoint.parameters()
    assert amount_of_sets(checkpoint, range(6), SearchOptions(ratio=share), set_of) == 1


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


@pytest.mark.parametrize("selection", ["greedy", "one-shot", "contiguous", "beam:2", "evolution:2", "swaps:2"])
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


def benched(path: Path, model: Path, per_token: dict[int, float], **settings: Any) -> Path:
    """A record of `bench`: seconds of a token by the number of blocks; the model itself has six."""
    common = {"engine": "vllm", "engine_version": "1", "batch": 8, "prompt_tokens": 5, "new_tokens": 32, "dtype": "bfloat16",
              "device": "cuda:0", **settings}  # fmt: skip
    results = [
        Result(
            f"m{blocks}", open_checkpoint(model).fingerprint if blocks == 6 else "other", "bench",
            {"source": "s", "sha256": "0", "rows": 1}, {**common, "blocks": blocks},
            {"tpot": Figure(seconds, None, "s", 3), "latency": Figure(9.0, None, "s", 3)}, 1, 1, 1.0, 1,
        )
        for blocks, seconds in per_token.items()
    ]  # fmt: skip
    Results(tuple(results)).save(path)
    return path


def test_times_of_blocks_from_a_bench(built: Built, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six blocks take 10 ms and four 8 ms: a block takes 1 ms, the rest 4 ms, and 1.25 times as fast is two blocks."""
    from shortstack.engine.streamed import StreamedModel

    monkeypatch.setattr(StreamedModel, "token_seconds", lambda _: 1 / 0)
    model = built("llama")
    times = benched(tmp_path / "bench.json", model, {6: 0.010, 4: 0.008})
    own = benched_seconds(open_checkpoint(model), times)
    assert own.blocks == pytest.approx((0.001,) * 6)
    assert own.outside == pytest.approx(0.004)
    scores = shortstack.score(str(model), criterion="magnitude", quiet=True)
    for speedup, blocks in ((1.0, 0), (1.2, 2), (1.26, 3), (2.4, 6)):
        made = shortstack.plan(str(model), scores=scores, speedup=speedup, times=times) if blocks < 6 else None
        assert made is None or len(made.removed) == blocks
    made = found(model, data, speedup=1.25, times=times)
    assert len(made.removed) == 2
    assert made.why["speedup"]["expected"] == pytest.approx(1.25)
    assert made.why["speedup"]["device"] == "cuda:0"
    assert made.why["speedup"]["of"] == "engine vllm, batch 8, prompt_tokens 5, new_tokens 32"


def test_more_depths_are_fitted_and_other_conditions_left_out(built: Built, tmp_path: Path) -> None:
    model = built("llama")
    times = benched(tmp_path / "bench.json", model, {6: 0.010, 5: 0.0091, 4: 0.0079, 3: 0.007})
    slope = 0.00102  # of 7.0, 7.9, 9.1, 10.0 ms
    assert benched_seconds(open_checkpoint(model), times).blocks[0] == pytest.approx(slope)
    apart = Results(
        (
            *load_results(times).results,
            *load_results(benched(tmp_path / "b.json", model, {3: 0.9}, batch=1)).results,
        )
    )
    apart.save(times)
    assert benched_seconds(open_checkpoint(model), times).blocks[0] == pytest.approx(slope)


@pytest.mark.parametrize(
    ("per_token", "says"),
    [
        ({4: 0.008}, "holds no time per token of"),
        ({6: 0.010}, "holds no model of fewer blocks beside"),
        ({6: 0.010, 4: 0.011}, "a block takes -0.0005 s of the 0.01 s of a token, in 6 blocks"),
        ({6: 0.010, 4: 0.001}, "a block takes 0.0045 s of the 0.01 s of a token, in 6 blocks"),
    ],
)
def test_a_bench_that_does_not_say_it(built: Built, tmp_path: Path, per_token: dict[int, float], says: str) -> None:
    model = built("llama")
    with pytest.raises(ShortstackError, match=says):
        benched_seconds(open_checkpoint(model), benched(tmp_path / "bench.json", model, per_token))


def test_times_of_whole_models_say_nothing_of_uneven_blocks(uneven: Path, tmp_path: Path) -> None:
    with pytest.raises(ShortstackError, match="differ in size"):
        benched_seconds(open_checkpoint(uneven), benched(tmp_path / "b.json", uneven, {6: 0.01, 4: 0.008}))


def test_times_without_a_speed_are_refused(built: Built, data: str, tmp_path: Path) -> None:
    times = benched(tmp_path / "bench.json", built("llama"), {6: 0.010, 4: 0.008})
    with pytest.raises(UsageError, match="times=.*: no effect without speedup"):
        found(built("llama"), data, remove=2, times=times)


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
