"""What one model writes: continuations of every prompt, greedy and drawn, with their measures; answers to the probes.

A draw depends on the seed and the prompt alone, not on what runs beside it. Drawing adds to the log-probabilities the
same noise for every model (Gumbel's trick: the largest sum is a draw), so that two models that would say the same do say
the same.

Legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from shortstack.data.collators import padded
from shortstack.data.tokenizer import end_of_text, open_ids
from shortstack.errors import ShortstackError
from shortstack.evaluation.evaluated_model import Subject
from shortstack.evaluation.prompts import DECODINGS
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


_PROBE_TOKENS = 24  # new ones; an answer of five words fits
_ROWS_AT_A_TIME = 16
_PADDING_TOLERANCE = 2e-2  # of the largest log-probability gap, in 16 bit


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
    usable = {}
    for number, row in enumerate(request.prompts):
        ids = _encoded(subject, row["text"])
        if ids is not None and _fits(subject, ids, request.new_tokens):
            usable[number] = ids
    if not usable:
        raise ShortstackError(
            f"{subject.name}: each of the {len(request.prompts)} prompts either cannot be encoded by its tokenizer or needs, "
            f"with {request.new_tokens} new tokens, more than its {subject.checkpoint.positions} positions",
            hint="give other prompts with --prompts FILE, or use fewer --new-tokens",
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
    ids = open_ids(tokenizer, text)
    if not ids or max(ids) >= subject.rows or tokenizer.unk_token_id in ids:
        return None
    return ids


def _fits(subject: Subject, ids: list[int], new_tokens: int) -> bool:
    return subject.checkpoint.too_long(len(ids), new_tokens) is None


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


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn: among the `top_k` likeliest, and of these the likeliest that together have `top_p`."""

    seed: int
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 0.95


def continued(
    subject: Subject, prompts: Sequence[list[int]], *, new_tokens: int, drawing: Drawing | None
) -> list[tuple[list[int], bool]]:
    """(new tokens, whether the text ended by itself) of each prompt; the end-of-text token is not among them.

    Args:
        subject: the model.
        prompts: in tokens; each with `new_tokens` more must fit into the model's positions.
        new_tokens: at most.
        drawing: None takes the likeliest token always.
    """
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    asked = subject.options.batch
    at_once = _ROWS_AT_A_TIME if asked == "auto" else asked
    if at_once > 1 and not _pads_well(subject, [prompts[order[0]], prompts[order[-1]]]):
        subject.progress.say(f"{subject.name}: padding changes its output, so prompts are run one by one")
        at_once = 1
    found: list[tuple[list[int], bool]] = [([], False)] * len(prompts)
    with subject.progress.bar("prompts", len(prompts)) as advance:
        for start in range(0, len(order), at_once):
            chosen = order[start : start + at_once]
            rows = _generated(subject, [prompts[number] for number in chosen], chosen, new_tokens, drawing)
            for number, row in zip(chosen, rows, strict=True):
                found[number] = row
            advance(len(chosen))
    return found


def _generated(
    subject: Subject, prompts: Sequence[list[int]], numbers: Sequence[int], new_tokens: int, drawing: Drawing | None
) -> list[tuple[list[int], bool]]:
    model, tokenizer = subject.model, subject.tokenizer
    ids_BT, mask_BT = _padded(prompts, subject.place)
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = {own} if isinstance(own, int) else set(own or [])
    ends = ends or set(end_of_text(tokenizer))
    config = GenerationConfig(
        do_sample=False, num_beams=1, repetition_penalty=1.0, no_repeat_ngram_size=0, max_new_tokens=new_tokens,
        min_new_tokens=0, pad_token_id=0, eos_token_id=sorted(ends) or None,
    )  # fmt: skip
    noise = LogitsProcessorList([KeyedDraw(drawing, numbers)] if drawing is not None else [])
    with torch.no_grad():
        texts_BT = model.generate(ids_BT, attention_mask=mask_BT, generation_config=config, logits_processor=noise)
    found = []
    for row in texts_BT[:, ids_BT.shape[1] :].tolist():
        end = next((place for place, token in enumerate(row) if token in ends), None)
        found.append((row if end is None else row[:end], end is not None))
    return found


def _padded(prompts: Sequence[list[int]], place: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts side by side, padded on the left, and the mask of what is text."""
    mask_BT = padded([[1] * len(prompt) for prompt in prompts], 0)
    return padded(prompts, 0).to(place), mask_BT.to(place)


@torch.no_grad()
def _pads_well(subject: Subject, prompts: Sequence[list[int]]) -> bool:
    """Whether a prompt beside a longer one gets the log-probabilities that it gets alone."""
    ids_BT, mask_BT = _padded(prompts, subject.place)
    if bool(mask_BT.all()):
        return True
    given = {"input_ids": ids_BT, "attention_mask": mask_BT}
    if "position_ids" in inspect.signature(subject.model.forward).parameters:
        given["position_ids"] = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)
    together_V = subject.model(**given, use_cache=False).logits[0, -1]
    alone_V = subject.model(input_ids=ids_BT[:1, -len(prompts[0]) :], use_cache=False).logits[0, -1]
    gap = (together_V.float().log_softmax(0) - alone_V.float().log_softmax(0)).abs().max()
    return bool(
        gap <= (1e-3 if together_V.dtype == torch.float32 else _PADDING_TOLERANCE) * alone_V.float().abs().max()
    )


class KeyedDraw(LogitsProcessor):  # type: ignore[misc]
    """Turns the choice of the likeliest token into a draw, with each prompt's own noise."""

    def __init__(self, drawing: Drawing, numbers: Sequence[int]) -> None:
        self._drawing = drawing
        self._generators = [torch.Generator().manual_seed(drawing.seed * 1_000_003 + number) for number in numbers]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores [B, V] with every token but the drawn one far below: what is likeliest now is the draw."""
        drawing, logits_BV = self._drawing, scores.float() / self._drawing.temperature
        kept = min(drawing.top_k, logits_BV.shape[1])
        top_BK, ids_BK = logits_BV.topk(kept, dim=1)  # sorted, the likeliest first
        before_BK = top_BK.softmax(dim=1).cumsum(dim=1).roll(1, dims=1)
        before_BK[:, 0] = 0.0  # the likeliest always stays
        rows = [torch.rand(logits_BV.shape[1], generator=g, dtype=torch.float64) for g in self._generators]
        noise_BV = -(-torch.stack(rows).clamp(min=1e-300).log()).log().float()
        drawn_BK = top_BK + noise_BV.to(logits_BV.device).gather(1, ids_BK)
        drawn_BK[before_BK >= drawing.top_p] = float("-inf")
        return torch.full_like(logits_BV, float("-inf")).scatter(1, ids_BK, drawn_BK)
