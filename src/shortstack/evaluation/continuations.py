"""What one model writes: continuations of every prompt, measured, and answers to the probes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shortstack.errors import ShortstackError
from shortstack.evaluation.evaluated_model import Subject
from shortstack.evaluation.text_metrics import (
    distinct_n,
    ends_in_loop,
    longest_repeat,
    outside_scripts,
    pieces_of,
    scripts_of,
)
from shortstack.runtime.memory import Usage

if TYPE_CHECKING:
    from shortstack.evaluation.prompts import GenerationRequest

DECODINGS = ("greedy", "drawn")
_PROBE_TOKENS = 24  # new ones; an answer of five words fits


@dataclass(frozen=True)
class Written:
    """What one model wrote.

    Attributes:
        found: per decoding the rows (`prompt` number, prompt and new token ids, text, ended, measures); the probes'
            answers; the numbers of prompts that were left out.
    """

    subject: Subject
    found: dict[str, Any]
    usage: Usage


def subject_texts(subject: Subject, request: GenerationRequest) -> Written:
    """Continuations and answers of one checkpoint."""
    found, usage = subject.found(
        "generation", {"what": "generation", "asked": request.sha256, "batch": subject.options.batch},
        lambda: _write(subject, request),
    )  # fmt: skip
    return Written(subject, found, usage)


def _write(subject: Subject, request: GenerationRequest) -> dict[str, Any]:
    from shortstack.evaluation.generate import Drawing, continued

    usable = {}
    for number, row in enumerate(request.prompts):
        ids = _encoded(subject, row["text"])
        if ids is not None and _fits(subject, ids, request.new_tokens):
            usable[number] = ids
    if not usable:
        raise ShortstackError(
            f"{subject.name}: none of the {len(request.prompts)} prompts can be written by its tokenizer and fits, with "
            f"{request.new_tokens} new tokens, into its {subject.checkpoint.positions} positions",
            hint="--prompts FILE with others, or fewer --new-tokens",
        )
    numbers = list(usable)
    found: dict[str, Any] = {"left_out": [n for n in range(len(request.prompts)) if n not in usable]}
    for decoding in DECODINGS:
        drawing = Drawing(request.seed) if decoding == "drawn" else None
        subject.progress.say(f"{subject.name}: {len(numbers)} prompts, {decoding} ...")
        texts = continued(subject, list(usable.values()), new_tokens=request.new_tokens, drawing=drawing)
        found[decoding] = [
            _row(subject, number, request.prompts[number], usable[number], tokens, ended)
            for number, (tokens, ended) in zip(numbers, texts, strict=True)
        ]
    return found | {"probes": _answers(subject, request)}


def _encoded(subject: Subject, text: str) -> list[int] | None:
    """The ids of a prompt; None where the tokenizer cannot write it."""
    tokenizer = subject.tokenizer
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    ids = ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
    if not ids or max(ids) >= subject.rows or tokenizer.unk_token_id in ids:
        return None
    return ids


def _fits(subject: Subject, ids: list[int], new_tokens: int) -> bool:
    positions = subject.checkpoint.positions
    return positions is None or len(ids) + new_tokens <= positions


def _row(
    subject: Subject, number: int, prompt: dict[str, str], prompt_ids: list[int], tokens: list[int], ended: bool
) -> dict[str, Any]:
    tokenizer = subject.tokenizer

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    return {
        "prompt": number, "register": prompt["register"], "prompt_ids": prompt_ids, "ids": tokens,
        "text": decode([*prompt_ids, *tokens]), "ended": float(ended), "length": len(tokens),
        "distinct_1": distinct_n(tokens, 1), "distinct_2": distinct_n(tokens, 2), "distinct_4": distinct_n(tokens, 4),
        "longest_repeat": longest_repeat(tokens), "loops": float(ends_in_loop(tokens)),
        "foreign": outside_scripts(pieces_of(tokens, decode), scripts_of(prompt["text"])),
    }  # fmt: skip


def _answers(subject: Subject, request: GenerationRequest) -> list[dict[str, Any]]:
    from shortstack.evaluation.generate import continued

    asked = [(probe, _encoded(subject, probe.prompt)) for probe in request.probes]
    fitting = [(probe, ids) for probe, ids in asked if ids is not None and _fits(subject, ids, _PROBE_TOKENS)]
    if not fitting:
        return []
    subject.progress.say(f"{subject.name}: {len(fitting)} probes ...")
    texts = continued(subject, [ids for _, ids in fitting], new_tokens=_PROBE_TOKENS, drawing=None)
    answers = []
    for (probe, ids), (tokens, _) in zip(fitting, texts, strict=True):
        whole = str(subject.tokenizer.decode([*ids, *tokens], skip_special_tokens=True))
        asked_text = str(subject.tokenizer.decode(ids, skip_special_tokens=True))
        said = whole.removeprefix(asked_text)
        answers.append({"kind": probe.kind, "answer": probe.answer, "said": said, "right": float(probe.is_right(said))})
    return answers
