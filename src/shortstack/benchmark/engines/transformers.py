"""transformers in this process: `generate` as users call it, eager, or compiled with a static cache."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import CompileConfig, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from shortstack.artifacts.provenance import versions
from shortstack.benchmark.engines import DoesNotFitError, EngineError, Sample, Workload
from shortstack.benchmark.options import EngineOptions
from shortstack.engine.load import quiet_transformers
from shortstack.errors import first_line
from shortstack.evaluation.evaluated_model import Subject
from shortstack.runtime.memory import is_out_of_memory, return_free_memory
from shortstack.runtime.private_names import compile_everywhere, compiled_whole

PUBLISHED_SAMPLING: dict[str, Any] = {"do_sample": True, "top_k": 50, "top_p": 0.95, "temperature": 1.0}
_RECOMPILATIONS = 256  # torch falls back to eager, without a word, beyond 8 shapes
_BACKEND = "inductor"


class TransformersEngine:
    """One checkpoint in this process."""

    in_process = True

    def __init__(self, subject: Subject, options: EngineOptions, compiled: bool = False) -> None:
        self._subject, self._compiled = subject, compiled
        self.name = "compiled" if compiled else "transformers"
        self.version = versions()["transformers"]
        self.precision = subject.settings["dtype"]
        self.notes: list[str] = []
        self.peak_rss_bytes: int | None = None  # measured in a process of its own

    def find(self) -> None:
        """It is part of this process."""

    def start(self) -> None:
        """Load the model."""
        _ = self._subject.model

    def stop(self) -> None:
        """Let the model go."""
        self._subject.release()
        if self._compiled:
            torch.compiler.reset()
        return_free_memory()

    def greedy(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """The most likely continuation of each prompt, one prompt at a time."""
        found = []
        for prompt in prompts:
            workload = Workload(1, tuple(prompt), new_tokens)
            found.append(self._generated(workload, None)[0, len(prompt) :].tolist())
        return found

    def tokenize(self, texts: Sequence[str]) -> None:
        """It has the checkpoint's tokenizer."""

    def bench(self, workload: Workload, *, runs: int, warmup: int) -> list[Sample]:
        """Time some runs, after others that are not counted."""
        samples = [self._run(workload) for _ in range(warmup + runs)]
        return samples[warmup:]

    def served_rate(self, workload: Workload) -> float | None:
        """It has no measure of its own."""

    def _run(self, workload: Workload) -> Sample:
        clock = _Clock(self._subject.place, workload.batch)
        self._generated(workload, clock)
        return clock.sample(workload.new_tokens - 1)

    def _generated(self, workload: Workload, clock: _Clock | None) -> torch.Tensor:
        subject = self._subject
        ids_BT = torch.tensor([workload.prompt_ids] * workload.batch, device=subject.place)
        config = _generation_config(subject, workload, self._compiled)
        devices = [subject.place] if subject.place.type == "cuda" else []
        try:
            with (
                torch.no_grad(), torch.random.fork_rng(devices=devices), quiet_transformers(),
                compiled_whole(_RECOMPILATIONS) if self._compiled else contextlib.nullcontext(),
                clock or contextlib.nullcontext(),
            ):  # fmt: skip
                torch.manual_seed(workload.seed)
                made: torch.Tensor = subject.model.generate(
                    ids_BT,
                    attention_mask=torch.ones_like(ids_BT),
                    generation_config=config,
                    stopping_criteria=StoppingCriteriaList([clock] if clock is not None else []),
                )
        except (RuntimeError, ValueError, MemoryError) as error:
            if not isinstance(error, MemoryError) and not is_out_of_memory(error):
                raise EngineError(
                    f"{subject.name}: {self.name}: generation fails: {first_line(error)[:200]}"
                ) from error
        else:
            if made.shape[1] != workload.prompt_tokens + workload.new_tokens:
                new = made.shape[1] - workload.prompt_tokens
                raise EngineError(f"{subject.name}: {self.name}: {new} new tokens, expected {workload.new_tokens}")
            return made
        if subject.place.type == "cuda":  # outside of the handler, which holds the tensors that did not fit
            torch.cuda.empty_cache()
        raise DoesNotFitError(f"{subject.name}: out of memory at batch {workload.batch}")


class _Clock(StoppingCriteria):  # type: ignore[misc]
    """Times a generation from outside: begin, first new token, end. It never stops it."""

    def __init__(self, device: torch.device, batch: int) -> None:
        self._device = device if device.type == "cuda" else None
        self._goes_on = torch.zeros(batch, dtype=torch.bool, device=device)
        self._times: list[float] = []
        self._events: list[torch.cuda.Event] = []

    def __enter__(self) -> _Clock:
        self._mark()
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self._mark()

    def __call__(self, *_given: Any, **_named: Any) -> torch.Tensor:
        if len(self._times) == 1:
            self._mark()
        return self._goes_on

    def _mark(self) -> None:
        if self._device is not None:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
            self._events.append(event)
            torch.cuda.synchronize(self._device)  # generate itself waits for every token
        self._times.append(time.perf_counter())

    def sample(self, steps: int) -> Sample:
        begun, first, ended = self._times
        on_device = self._events[0].elapsed_time(self._events[-1]) / 1000 if self._events else None
        return Sample(ended - begun, first - begun, ended - first, steps, on_device)


def _generation_config(subject: Subject, workload: Workload, compiled: bool) -> GenerationConfig:
    sampled = PUBLISHED_SAMPLING if workload.sampling == "published" else {"do_sample": False}
    more: dict[str, Any] = {}
    if compiled:
        mode = "reduce-overhead" if subject.place.type == "cuda" else "default"
        how = CompileConfig(mode=mode, dynamic=False, backend=_BACKEND)
        compile_everywhere(how)
        more = {"cache_implementation": "static", "compile_config": how}
    own = subject.model.generation_config
    return GenerationConfig(
        max_new_tokens=workload.new_tokens,
        min_new_tokens=workload.new_tokens,  # end of text is suppressed
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id if own.pad_token_id is not None else 0,
        use_cache=True,
        **sampled,
        **more,
    )
