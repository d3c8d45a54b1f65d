"""Sample continuations of a prompt: what a reader judges first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shortstack.artifacts.results import Result, Results
from shortstack.checkpoint.forecast import Forecast
from shortstack.common.options import Options, expect, refuse_idle, stage
from shortstack.data.tokenizer import padding_id
from shortstack.errors import ShortstackError
from shortstack.evaluation.evaluated_model import Subject, evaluated, open_subjects
from shortstack.evaluation.options import EvaluationOptions

_DEFAULTS = EvaluationOptions()
PUBLISHED_PROMPT = "The Leaning Tower of Pisa is known for"


@dataclass(frozen=True)
class SampleRequest(Options):
    """What every model is asked to continue, and how; the defaults are the published ones.

    Attributes:
        prompt: The text to continue.
        count: The number of continuations for each model.
        new_tokens: The number of tokens in a continuation. The end-of-text token does not end it.
        top_k: Sample from this many of the most likely tokens.
        top_p: Sample from the most likely tokens that together have this probability.
        temperature: The temperature of the sampling. 0 always takes the most likely token.
        seed: The seed of the sampling, the same for every model.
    """

    prompt: str = PUBLISHED_PROMPT
    count: int = 5
    new_tokens: int = 128
    top_k: int = 50
    top_p: float = 0.95
    temperature: float = 1.0
    seed: int = 1234

    def __post_init__(self) -> None:
        for name in ("count", "new_tokens", "top_k"):
            expect(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        expect(0 <= self.temperature < math.inf, "temperature", self.temperature, "a number from 0 up")
        expect(0 < self.top_p <= 1, "top_p", self.top_p, "a share above 0, at most 1")
        if self.temperature == 0:
            refuse_idle(self, ["top_k", "top_p"], "with --temperature 0, which takes the most likely token")
            if self.count != 1:
                refuse_idle(self, ["count"], "with --temperature 0: all continuations are the same")
                object.__setattr__(self, "count", 1)


_REQUEST = SampleRequest()


@stage
def evaluate_samples(
    *models: str,
    request: SampleRequest = _REQUEST,
    out: Path | None = None,
    csv: Path | None = None,
    options: EvaluationOptions = _DEFAULTS,
) -> Results:
    """Print continuations of one prompt by each checkpoint, with the same seed. The defaults are those of Shortened LLaMA.

    Args:
        models: The checkpoints: directories, hub ids such as `org/name@revision`, or `embedded`.
        request: what is continued, and how.
        out: Write the results to this file (results.json).
        csv: Write the published text file into this folder: gen_text.txt for each model.
        options: how it is run.

    Returns:
        One result for each checkpoint; the texts are its items.

    Raises:
        ShortstackError: a checkpoint cannot be loaded, or prompt and continuation are longer than its positions.
    """
    subjects = open_subjects("samples", models, options, out, csv)
    return evaluated(subjects, lambda subject: [subject_samples(subject, request)], out, csv)


def subject_samples(subject: Subject, request: SampleRequest) -> Result:
    """The continuations by one checkpoint."""
    settings = asdict(request)
    found, usage = subject.found(
        "samples", {"what": "samples", **settings}, lambda: {"texts": _continuations(subject, request)}
    )
    settings["prompt_tokens"] = len(subject.tokenizer(request.prompt, verbose=False)["input_ids"])
    return subject.result("samples", usage, data={}, settings=settings, figures={}, per_item=found)


def _continuations(subject: Subject, request: SampleRequest) -> list[str]:
    import torch
    from transformers import GenerationConfig

    checkpoint, tokenizer, model, place = subject.checkpoint, subject.tokenizer, subject.model, subject.place
    ids = tokenizer(request.prompt, return_tensors="pt")["input_ids"].to(place)
    new_tokens = request.new_tokens
    too_long = checkpoint.too_long(ids.shape[1], new_tokens)
    if too_long:
        raise ShortstackError(too_long, hint="use fewer --new-tokens, or a shorter --prompt")
    sampled = request.temperature != 0
    generation = GenerationConfig(
        do_sample=sampled,
        num_return_sequences=request.count,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        pad_token_id=padding_id(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        **({"top_k": request.top_k, "top_p": request.top_p, "temperature": request.temperature} if sampled else {}),
    )
    devices = [place] if place.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(request.seed)
        texts = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=generation)
    return [str(tokenizer.decode(text, skip_special_tokens=True)) for text in texts]


def check_positions(values: Mapping[str, Any]) -> list[str]:
    """Refuse continuations that are longer than a model can take, before anything runs.

    Raises:
        ShortstackError: they are.
    """
    models: list[Forecast | None] = values.get("models") or []
    for model in models:
        if model is not None:
            model.check_positions("new_tokens", values.get("new_tokens", _REQUEST.new_tokens))
    return []
