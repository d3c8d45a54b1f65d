"""Sample continuations of a prompt: what a reader judges first."""

from __future__ import annotations

import time
from pathlib import Path

from shortstack.checkpoint.reader import Checkpoint
from shortstack.checkpoint.writer import check_writable_file
from shortstack.errors import ShortstackError, UsageError
from shortstack.evaluation.results import Result, Results
from shortstack.machine import DType, peak_rss_bytes
from shortstack.opening import open_model
from shortstack.tokenizers import load_tokenizer

PUBLISHED_PROMPT = "The Leaning Tower of Pisa is known for"


def evaluate_samples(
    *models: str,
    prompt: str = PUBLISHED_PROMPT,
    count: int = 5,
    new_tokens: int = 128,
    top_k: int = 50,
    top_p: float = 0.95,
    temperature: float = 1.0,
    seed: int = 1234,
    out: Path | None = None,
    dtype: DType = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Results:
    """Continuations of one prompt by each checkpoint, with the same seed. The defaults are the published ones.

    Args:
        models: checkpoint directories, hub ids such as `org/name@revision`, or `embedded`.
        prompt: what to continue.
        count: number of continuations per model.
        new_tokens: tokens per continuation; end-of-text does not end it.
        top_k: draw among this many tokens.
        top_p: and among the most likely ones that together have this probability.
        temperature: 0 takes the most likely token always.
        seed: of the sampling, the same for every model.
        out: write the results here (results.json).
        dtype: what to compute in; `auto` is float32 on a CPU, the checkpoint's own elsewhere.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        trust_remote_code: run code that comes with the checkpoint.

    Returns:
        A result per checkpoint; the texts are its items.

    Raises:
        ShortstackError: a checkpoint cannot be loaded, or prompt and continuation are longer than its positions.
    """
    if not models:
        raise UsageError("no model given", hint="shortstack eval samples MODEL...")
    if count < 1 or new_tokens < 1 or temperature < 0 or top_k < 1 or not 0 < top_p <= 1:
        raise UsageError("count, new tokens and top-k are at least 1, temperature at least 0, top-p in (0, 1]")
    if out is not None:
        check_writable_file(Path(out))
    settings = {
        "prompt": prompt,
        "count": count,
        "new_tokens": new_tokens,
        "top_k": top_k,
        "top_p": top_p,
        "temperature": temperature,
        "seed": seed,
    }
    results = []
    for checkpoint in [open_model(model) for model in models]:
        started = time.perf_counter()
        texts = _continuations(checkpoint, settings, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        results.append(
            Result(
                model=checkpoint.source,
                fingerprint=checkpoint.fingerprint,
                what="samples",
                data={},
                settings=settings,
                figures={},
                parameters=checkpoint.parameters(),
                nbytes=checkpoint.nbytes,
                seconds=time.perf_counter() - started,
                peak_rss_bytes=peak_rss_bytes(),
                per_item={"texts": texts},
            )
        )
    found = Results(tuple(results))
    if out is not None:
        found.save(out)
    return found


def _continuations(
    checkpoint: Checkpoint, settings: dict[str, object], *, dtype: DType, device: str, trust_remote_code: bool
) -> list[str]:
    import torch
    from transformers import GenerationConfig

    from shortstack.engine.loading import load_model

    tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
    model, _, place = load_model(checkpoint, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    ids = tokenizer(str(settings["prompt"]), return_tensors="pt")["input_ids"].to(place)
    new_tokens, positions = int(str(settings["new_tokens"])), checkpoint.positions
    if positions is not None and ids.shape[1] + new_tokens > positions:
        raise ShortstackError(
            f"{checkpoint.source}: {ids.shape[1]} prompt tokens and {new_tokens} new ones, but {positions} positions",
            hint="fewer --new-tokens, or a shorter --prompt",
        )
    sampled = settings["temperature"] != 0
    generation = GenerationConfig(
        do_sample=sampled,
        num_return_sequences=settings["count"] if sampled else 1,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        eos_token_id=tokenizer.eos_token_id,
        **(
            {"top_k": settings["top_k"], "top_p": settings["top_p"], "temperature": settings["temperature"]}
            if sampled
            else {}
        ),
    )
    devices = [place] if place.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(str(settings["seed"])))
        texts = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=generation)
    return [str(tokenizer.decode(text, skip_special_tokens=True)) for text in texts]
