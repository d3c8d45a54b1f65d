"""Options of a sweep: defaults, the published preset, what means nothing."""

from __future__ import annotations

import pytest

from shortstack.benchmark.engines import measured_engines
from shortstack.benchmark.options import Sweep, SweepOptions, numbers
from shortstack.errors import UsageError


def test_the_published_sweep() -> None:
    assert Sweep.of(SweepOptions(preset="shortened-llm")) == Sweep(
        batches=(1, 8, 16, 32, 64, 128, 256),
        new_tokens=(128, 512),
        prompt_tokens=None,
        sampling="published",
        runs=20,
        warmup=10,
    )


def test_what_is_given_beside_a_preset_takes_precedence() -> None:
    sweep = Sweep.of(SweepOptions(preset="shortened-llm", batch="1", warmup=0, sampling="greedy"))
    assert (sweep.batches, sweep.new_tokens, sweep.sampling) == ((1,), (128, 512), "greedy")
    assert (sweep.runs, sweep.warmup) == (30, 0)


def test_defaults() -> None:
    assert Sweep.of(SweepOptions()) == Sweep((1,), (128,), None, "greedy", 20, 10)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (SweepOptions(batch="1,x"), "--batch '1,x': expected whole numbers from 1 up"),
        (SweepOptions(batch="0"), "--batch '0'"),
        (SweepOptions(new_tokens="8,8"), "--new-tokens '8,8'"),
        (SweepOptions(prompt_tokens=0), "--prompt-tokens 0"),
        (SweepOptions(runs=3, warmup=3), "--runs 3 --warmup 3: expected at least one run after the warm-up"),
        (SweepOptions(runs=3, warmup=-1), "--warmup -1"),
    ],
)
def test_what_means_nothing_is_refused(options: SweepOptions, says: str) -> None:
    with pytest.raises(UsageError) as refused:
        Sweep.of(options)
    assert says in refused.value.message


def test_numbers_in_recipes_may_be_numbers() -> None:
    assert numbers("--batch", 8) == (8,)  # type: ignore[arg-type]


def test_engines_by_name() -> None:
    assert measured_engines("transformers, llama.cpp") == ["transformers", "llama.cpp"]
    with pytest.raises(UsageError) as refused:
        measured_engines("vlm")
    assert refused.value.hint == "did you mean vllm?"
    for text in ("", "vllm,vllm", "mlx"):  # MLX is not timed
        with pytest.raises(UsageError):
            measured_engines(text)
