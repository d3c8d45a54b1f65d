"""The options of measuring: what every run does, in which engine, and how."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar, Literal

from shortstack.checkpoint.options import CheckpointOptions, ComputeOptions
from shortstack.common.option_values import Listed
from shortstack.common.options import Options
from shortstack.errors import UsageError

Sampling = Literal["greedy", "published"]
PresetName = Literal["shortened-llm"]


@dataclass(frozen=True)
class SweepOptions(Options):
    """What is run: every batch size with every number of new tokens.

    Attributes:
        preset: A published sweep. Options that are given beside it take precedence. `shortened-llm` is batch 1, 8, 16,
            32, 64, 128 and 256 with 128 and 512 new tokens after the published prompt, sampled as published, in 30 runs
            of which 10 are warm-up.
        batch: The batch sizes, separated by commas. By default it is 1.
        prompt_tokens: The number of tokens in the prompt, which is English text. By default the published prompt is
            used with the model's own tokenizer.
        new_tokens: The numbers of new tokens, separated by commas. By default it is 128. The end-of-text token is
            suppressed.
        sampling: How tokens are chosen: `greedy`, or `published` (top-k 50, top-p 0.95, temperature 1). By default it
            is greedy.
        runs: The number of runs of each configuration, including the warm-up. By default it is 30.
        warmup: The number of first runs of each configuration that are not counted. By default it is 10.
    """

    preset: PresetName | None = None
    batch: Listed | None = None
    prompt_tokens: int | None = None
    new_tokens: Listed | None = None
    sampling: Sampling | None = None
    runs: int | None = None
    warmup: int | None = None


@dataclass(frozen=True)
class EngineOptions(Options):
    """Where engines are, and how they are called.

    Attributes:
        engine_python: The Python of the engine's own environment, such as VENV/bin/python.
        engine_binary: The engine's program, or the folder that holds it. Without `engine_python` and `engine_binary`,
            an engine is searched for in the folder that the environment variable SHORTSTACK_ENGINES names (`make
            engines` fills one), then on PATH.
        engine_args: Further command line arguments for the engine's program.
        time_limit: The time limit in seconds for one call of an external engine.
    """

    engine_python: Path | None = None
    engine_binary: Path | None = None
    engine_args: str = ""
    time_limit: float = 1800.0


@dataclass(frozen=True)
class MeasuringOptions(ComputeOptions, CheckpointOptions):
    """How it is measured.

    Attributes:
        memory: Measure peak memory and utilisation too, in a separate process.
        seed: The seed of the sampling.
        fresh: Measure everything again, also what an interrupted run has measured.
    """

    LAST: ClassVar[tuple[str, ...]] = ("dtype", "device", "fresh", *CheckpointOptions.LAST)

    memory: bool = True
    seed: int = 1234
    fresh: bool = False


@dataclass(frozen=True)
class Sweep:
    """What is run, with every choice made.

    Attributes:
        batches, new_tokens: every one of one with every one of the other.
        prompt_tokens: None for the published prompt.
        sampling: how a token is chosen.
        runs: of each configuration, without the warm-up.
        warmup: runs before them.
    """

    batches: tuple[int, ...] = (1,)
    new_tokens: tuple[int, ...] = (128,)
    prompt_tokens: int | None = None
    sampling: Sampling = "greedy"
    runs: int = 20
    warmup: int = 10

    @classmethod
    def of(cls, options: SweepOptions) -> Sweep:
        """The options over those of the preset, over the defaults.

        Raises:
            UsageError: one of them means nothing.
        """
        preset = PRESETS[options.preset] if options.preset is not None else SweepOptions()
        chosen = {
            field.name: next(
                (value for value in (getattr(options, field.name), getattr(preset, field.name)) if value is not None),
                None,
            )
            for field in fields(SweepOptions)
        }
        runs, warmup = (
            30 if chosen["runs"] is None else chosen["runs"],
            10 if chosen["warmup"] is None else chosen["warmup"],
        )
        if not 0 <= warmup < runs:
            raise UsageError(f"--runs {runs} --warmup {warmup}: expected at least one run after the warm-up")
        if chosen["prompt_tokens"] is not None and chosen["prompt_tokens"] < 1:
            raise UsageError(f"--prompt-tokens {chosen['prompt_tokens']}: expected at least 1")
        return cls(
            numbers("--batch", "1" if chosen["batch"] is None else chosen["batch"]),
            numbers("--new-tokens", "128" if chosen["new_tokens"] is None else chosen["new_tokens"]),
            chosen["prompt_tokens"],
            chosen["sampling"] or "greedy",
            runs - warmup,
            warmup,
        )


PRESETS: dict[PresetName, SweepOptions] = {
    "shortened-llm": SweepOptions(
        batch="1,8,16,32,64,128,256", new_tokens="128,512", sampling="published", runs=30, warmup=10
    ),
}


def numbers(option: str, text: str) -> tuple[int, ...]:
    """`1,8` -> (1, 8).

    Raises:
        UsageError: these are not whole numbers from 1 up, each once.
    """
    try:
        found = tuple(int(part) for part in str(text).split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1 or len(set(found)) < len(found):
        raise UsageError(f"{option} {text!r}: expected whole numbers from 1 up, each once, separated by commas")
    return found
