"""How likely the dense model finds what each model wrote: drift that no count of n-grams shows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from shortstack.common.json_text import json_text
from shortstack.evaluation.continuations import DECODINGS, Written
from shortstack.evaluation.evaluated_model import Subject
from shortstack.evaluation.options import EvaluationOptions
from shortstack.families.open_model import dense_of, open_model


def find_judge(written: Sequence[Written], dense: str | None, options: EvaluationOptions) -> tuple[Subject, list[str]]:
    """(the dense model, what a reader should know): the one asked for, the one that the models were made of, or the first.

    Raises:
        ShortstackError: the one asked for cannot be opened.
    """
    first = written[0].subject
    if dense is not None:
        return Subject(open_model(dense, progress=first.progress), options, first.progress), []
    for one in written:
        checkpoint, note = dense_of(one.subject.checkpoint, None, first.progress)
        if checkpoint is not None:
            return Subject(checkpoint, options, first.progress), []
        if note:
            return first, [f"{note}; the texts are judged by {first.name}"]
    return first, []


def judgement(judge: Subject, one: Written) -> dict[str, list[float | None]]:
    """Per decoding, the mean NLL per token of each text under the judge, in nats; None where it cannot read the text."""
    alike = judge.tokenizer.get_vocab() == one.subject.tokenizer.get_vocab()
    asked = {
        name: [
            (row["prompt_ids"], row["ids"]) if alike else _as_judge_reads(judge, one, row) for row in one.found[name]
        ]
        for name in DECODINGS
    }
    digest = hashlib.sha256(json_text(asked).encode()).hexdigest()
    key = {"what": "judgement", "texts": digest}
    what = f"perplexity of what {one.subject.name} wrote"
    found, _ = judge.found(what, key, lambda: {name: _nll(judge, requests) for name, requests in asked.items()})
    return found


def _nll(judge: Subject, requests: Sequence[tuple[list[int], list[int]]]) -> list[float | None]:
    from shortstack.evaluation.logprobs import continuation_logprobs

    read = [bool(context and said) and max(*context, *said) < judge.rows for context, said in requests]
    asked = [request for request, is_read in zip(requests, read, strict=True) if is_read]
    sums = iter(continuation_logprobs(judge.model, asked, max_length=judge.checkpoint.positions, device=judge.place))
    return [-next(sums)[0] / len(said) if is_read else None for (_, said), is_read in zip(requests, read, strict=True)]


def _as_judge_reads(judge: Subject, one: Written, row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """(context, continuation) in the tokens of a judge of another vocabulary."""
    prompt = one.subject.tokenizer.decode(row["prompt_ids"], skip_special_tokens=True)
    context = list(judge.tokenizer(prompt, verbose=False)["input_ids"])
    whole = list(judge.tokenizer(row["text"], verbose=False)["input_ids"])
    return context, whole[len(context) :]
