"""Speculative decoding: a pruned model drafts tokens, the dense one verifies several of them in one pass. Greedy.

The text must be the dense model's own. What it gains is measured beside what the two models' times imply: with c the
draft's time per token and v the dense model's pass over a draft, both in units of the dense model's time per token, and k
tokens drafted at a time, it pays where more than k c + v - 1 of them are accepted (Leviathan et al. 2023, arXiv 2211.17192).
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig

from shortstack.artifacts.provenance import versions
from shortstack.artifacts.results import Figure, Result, mean_figure
from shortstack.benchmark.engines import EngineError
from shortstack.benchmark.options import Sweep
from shortstack.benchmark.timing import median_figure, paired_ratio
from shortstack.engine.load import quiet_transformers
from shortstack.errors import ShortstackError, first_line
from shortstack.evaluation.evaluated_model import Subject
from shortstack.evaluation.prompts import GenerationRequest
from shortstack.runtime.memory import Usage, used
from shortstack.runtime.stopwatch import now

_VERIFICATIONS = 5  # passes of each length that are timed, for each prompt
_TIE = 1e-3  # a gap between the two likeliest tokens, in logits, that rounding may close: of the largest logit


@dataclass
class _Drafted:
    """One prompt: what was written, how long each way took, and how the drafts fared."""

    dense_seconds: float
    assisted_seconds: float
    draft_seconds: float
    proposed: int
    accepted: int
    passes: int
    new_tokens: int
    differs_at: int | None = None
    gap: float = 0.0


@dataclass
class _Pair:
    """The two models, loaded.

    Attributes:
        lengths: of the inputs of the dense model's passes in the current generation.
    """

    dense: Subject
    draft: Subject
    draft_tokens: int
    lengths: list[int] = field(default_factory=list)

    def generated(
        self, ids_T: Sequence[int], new_tokens: int, *, assisted: bool, of: Subject | None = None
    ) -> list[int]:
        subject = of or self.dense
        ids_BT = torch.tensor([list(ids_T)], device=subject.place)
        own = subject.model.generation_config
        config = GenerationConfig(
            do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens, eos_token_id=own.eos_token_id,
            pad_token_id=own.pad_token_id if own.pad_token_id is not None else 0, use_cache=True,
        )  # fmt: skip
        try:
            with torch.no_grad(), quiet_transformers():
                made = subject.model.generate(
                    ids_BT, attention_mask=torch.ones_like(ids_BT), generation_config=config,
                    **({"assistant_model": self.draft.model} if assisted else {}),
                )  # fmt: skip
        except (RuntimeError, ValueError) as error:
            how = "assisted generation" if assisted else "generation"
            raise EngineError(f"{subject.name}: {how} fails: {first_line(error)[:200]}") from error
        return [int(token) for token in made[0, len(ids_T) :]]

    def timed(self, *arguments: Any, **how: Any) -> tuple[list[int], float]:
        started = now(self.dense.place)
        tokens = self.generated(*arguments, **how)
        return tokens, now(self.dense.place) - started


def refuse_other_vocabulary(dense: Subject, draft: Subject) -> None:
    """A draft's tokens must be the dense model's.

    Raises:
        ShortstackError: they are not.
    """
    hint = "a draft is a pruned copy of the model, or another model of the same family with the same tokenizer"
    if dense.rows != draft.rows:
        raise ShortstackError(
            f"{draft.name}: a draft has the vocabulary of {dense.name}: expected {dense.rows} tokens, found {draft.rows}",
            hint=hint,
        )
    ours, theirs = dense.tokenizer.get_vocab(), draft.tokenizer.get_vocab()
    if ours != theirs:
        other = next(token for token in sorted({*ours, *theirs}) if ours.get(token) != theirs.get(token))
        raise ShortstackError(
            f"{draft.name}: a draft has the vocabulary of {dense.name}: token {other!r} is "
            f"{ours.get(other)} there and {theirs.get(other)} here",
            hint=hint,
        )


def draft_result(dense: Subject, draft: Subject, sweep: Sweep, draft_tokens: int, seed: int) -> Result:
    """Decode prompts of several registers alone and with the draft, in turns, and say what that gained.

    Args:
        dense: the model whose text is wanted.
        draft: the one that proposes tokens.
        sweep: the first number of new tokens; a prompt per run.
        draft_tokens: proposed at a time.
        seed: of the prompts' order.

    Raises:
        ShortstackError: the vocabularies differ, no prompt fits, or the two cannot work together.
    """
    refuse_other_vocabulary(dense, draft)
    new_tokens = sweep.new_tokens[0]
    prompts = _prompts(dense, draft, new_tokens, seed)
    dense.progress.say(f"{dense.name} with {draft.name} as its draft, {new_tokens} new tokens ...")
    with used(dense.place) as usage:
        pair = _Pair(dense, draft, draft_tokens)
        config = draft.model.generation_config
        config.num_assistant_tokens, config.num_assistant_tokens_schedule = draft_tokens, "constant"
        config.assistant_confidence_threshold = 0.0  # it always proposes that many
        hook = dense.model.register_forward_pre_hook(
            lambda _module, _given, named: pair.lengths.append(int(named["input_ids"].shape[1])), with_kwargs=True
        )
        try:
            for number in range(sweep.warmup):
                _one(pair, prompts[number % len(prompts)], new_tokens, number)
            rows = [_one(pair, prompts[number % len(prompts)], new_tokens, number) for number in range(sweep.runs)]
        finally:
            hook.remove()
        verify = [_verification(pair, ids) for ids in prompts[: sweep.runs]]
    return _result(pair, rows, verify, usage, sweep, len(prompts))


def _prompts(dense: Subject, draft: Subject, new_tokens: int, seed: int) -> list[list[int]]:
    import random

    request = GenerationRequest.read(None, seed=seed)
    positions = [subject.checkpoint.positions for subject in (dense, draft)]
    longest = min((limit for limit in positions if limit is not None), default=None)
    encoded = [list(dense.tokenizer(row["text"], verbose=False)["input_ids"]) for row in request.prompts]
    fitting = [ids for ids in encoded if ids and (longest is None or len(ids) + new_tokens <= longest)]
    if not fitting:
        raise ShortstackError(
            f"{dense.name}: no prompt fits with {new_tokens} new tokens into {longest} positions",
            hint="use fewer --new-tokens",
        )
    random.Random(seed).shuffle(fitting)  # registers alternate, whatever the number of runs
    return fitting


def _one(pair: _Pair, ids_T: list[int], new_tokens: int, number: int) -> _Drafted:
    """One prompt in all ways, forwards or backwards by its number."""
    found: dict[str, tuple[list[int], float]] = {}
    ways = ["dense", "assisted", "draft"]
    lengths: list[int] = []
    for way in ways if number % 2 == 0 else reversed(ways):
        pair.lengths.clear()
        of = pair.draft if way == "draft" else None
        found[way] = pair.timed(ids_T, new_tokens, assisted=way == "assisted", of=of)
        if way == "assisted":
            lengths = list(pair.lengths)
    # The first pass has the prompt in front of the draft; every further one the last token.
    proposed = lengths[0] - len(ids_T) + sum(length - 1 for length in lengths[1:])
    tokens, expected = found["assisted"][0], found["dense"][0]
    differs = next((at for at, (a, b) in enumerate(zip(tokens, expected, strict=True)) if a != b), None)
    gap = 0.0 if differs is None else _gap(pair, [*ids_T, *expected[:differs]])
    return _Drafted(
        found["dense"][1], found["assisted"][1], found["draft"][1], proposed, max(0, new_tokens - len(lengths)),
        len(lengths), new_tokens, differs, gap,
    )  # fmt: skip


@torch.no_grad()
def _gap(pair: _Pair, ids_T: list[int]) -> float:
    """By how much the likeliest next token leads, relative to the largest logit."""
    logits = pair.dense.model(torch.tensor([ids_T], device=pair.dense.place)).logits[0, -1].float()
    best = logits.topk(2).values
    return float((best[0] - best[1]) / logits.abs().max())


@torch.no_grad()
def _verification(pair: _Pair, ids_T: list[int]) -> float:
    """How long a pass of the dense model over a draft takes behind a prompt, over one for one token: medians of a few."""
    model = pair.dense.model
    ids_BT = torch.tensor([ids_T], device=pair.dense.place)
    seconds: dict[int, list[float]] = {1: [], pair.draft_tokens + 1: []}
    for _ in range(_VERIFICATIONS):
        for tokens, times in seconds.items():
            cache = model(ids_BT, use_cache=True).past_key_values
            started = now(pair.dense.place)
            model(ids_BT[:, -1:].repeat(1, tokens), past_key_values=cache, use_cache=True)
            times.append(now(pair.dense.place) - started)
    one, several = (statistics.median(times) for times in seconds.values())
    return several / one


def break_even(draft_tokens: int, draft_cost: float, verify_cost: float) -> float:
    """Accepted tokens per pass above which drafting pays; more than are drafted where it never does.

    Args:
        draft_tokens: proposed at a time.
        draft_cost: the draft's time per token over the dense model's.
        verify_cost: the dense model's time for a draft and one more token over that for one token.
    """
    return draft_tokens * draft_cost + verify_cost - 1


def _result(
    pair: _Pair, rows: Sequence[_Drafted], verify: Sequence[float], usage: Usage, sweep: Sweep, prompts: int
) -> Result:
    dense, draft, new_tokens, k = pair.dense, pair.draft, sweep.new_tokens[0], pair.draft_tokens
    per_item: dict[str, list[float]] = {
        "dense_rate": [new_tokens / row.dense_seconds for row in rows],
        "assisted_rate": [new_tokens / row.assisted_seconds for row in rows],
        "draft_rate": [new_tokens / row.draft_seconds for row in rows],
        "acceptance": [row.accepted / row.proposed for row in rows if row.proposed],
        "accepted_length": [row.accepted / row.passes for row in rows],
        "identical": [float(row.differs_at is None) for row in rows],
    }
    draft_cost = statistics.median(row.draft_seconds / row.dense_seconds for row in rows)
    verify_cost = statistics.median(verify)
    needed = break_even(k, draft_cost, verify_cost)
    accepted = mean_figure(per_item["accepted_length"], "tokens")
    implied = ((accepted.value or 0) + 1) / (k * draft_cost + verify_cost)
    figures = {
        **{name: median_figure(per_item[name], "tokens/s") for name in ("dense_rate", "assisted_rate", "draft_rate")},
        "speedup": paired_ratio([r.dense_seconds for r in rows], [r.assisted_seconds for r in rows]),
        "acceptance": mean_figure(per_item["acceptance"], "share"),
        "accepted_length": accepted,
        "break_even_length": Figure(
            needed, None, "tokens", len(rows), f"of {k}, from the models' times" if needed < k else f"of {k}: it cannot pay"
        ),
        "implied_speedup": Figure(implied, None, "times", len(rows), "by the models' times and the accepted length"),
        "draft_cost": Figure(draft_cost, None, "share", len(rows), "the draft's time per token over the dense model's"),
        "verify_cost": Figure(verify_cost, None, "times", len(verify), f"a pass over {k + 1} tokens over one for one"),
        "identical": mean_figure(per_item["identical"], "share"),
    }  # fmt: skip
    label = f"transformers, greedy, {new_tokens} new tokens, draft {draft.name}, {k} at a time"
    return dense.result(
        "bench",
        usage,
        data={"source": label, "sha256": hashlib.sha256(label.encode()).hexdigest(), "rows": len(rows)},
        settings={
            "engine": "transformers", "engine_version": versions()["transformers"], "draft": draft.name,
            "draft_fingerprint": draft.checkpoint.fingerprint, "draft_parameters": draft.checkpoint.parameters(),
            "draft_tokens": k, "new_tokens": new_tokens, "runs": sweep.runs, "warmup": sweep.warmup, "prompts": prompts,
        },
        figures=figures,
        per_item=per_item,
        notes=_notes(pair, rows),
    )  # fmt: skip


def _notes(pair: _Pair, rows: Sequence[_Drafted]) -> list[str]:
    other = [row for row in rows if row.differs_at is not None]
    if not other:
        return []
    worst = max(other, key=lambda row: row.gap)
    if worst.gap <= _TIE:
        why = "where two tokens are equally likely up to rounding (passes of several tokens round differently)"
    else:
        why = "which must not happen: the two models do not work together here"
    return [
        f"{pair.dense.name}: {len(other)} of {len(rows)} texts differ from its own, the worst at new token "
        f"{worst.differs_at}, {why} (gap {worst.gap:.2g} of the largest logit)"
    ]


def is_exact(result: Result) -> bool:
    """Whether all texts are the dense model's, but for ties that rounding decides."""
    return not any("must not" in note for note in result.notes)
