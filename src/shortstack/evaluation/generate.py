"""Continue prompts, greedily or by drawing; a draw depends on the seed and the prompt alone, not on what runs beside it.

Drawing adds to the log-probabilities the same noise for every model (Gumbel's trick: the largest sum is a draw), so that two
models that would say the same do say the same.

Legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from shortstack.evaluation.evaluated_model import Subject

_ROWS_AT_A_TIME = 16
_PADDING_TOLERANCE = 2e-2  # of the largest log-probability gap, in 16 bit


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
        subject.progress.say(f"{subject.name}: padding changes what it says: prompts are run one by one")
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
    ends = _ends(model, tokenizer.eos_token_id)
    config = GenerationConfig(
        do_sample=False, num_beams=1, repetition_penalty=1.0, no_repeat_ngram_size=0, max_new_tokens=new_tokens,
        min_new_tokens=0, pad_token_id=0, eos_token_id=sorted(ends) or None,
    )  # fmt: skip
    noise = LogitsProcessorList([_KeyedDraw(drawing, numbers)] if drawing is not None else [])
    with torch.no_grad():
        texts_BT = model.generate(ids_BT, attention_mask=mask_BT, generation_config=config, logits_processor=noise)
    found = []
    for row in texts_BT[:, ids_BT.shape[1] :].tolist():
        end = next((place for place, token in enumerate(row) if token in ends), None)
        found.append((row if end is None else row[:end], end is not None))
    return found


def _ends(model: Any, tokenizers: int | None) -> set[int]:
    """Tokens that end a text, as the model's generation settings say; else the tokenizer's."""
    own = getattr(model.generation_config, "eos_token_id", None)
    own = [own] if isinstance(own, int) else list(own or [])
    return set(own) or ({int(tokenizers)} if tokenizers is not None else set())


def _padded(prompts: Sequence[list[int]], place: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts side by side, padded on the left, and the mask of what is text."""
    longest = max(map(len, prompts))
    ids_BT = torch.zeros((len(prompts), longest), dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask_BT[row, longest - len(prompt) :] = 1
    return ids_BT.to(place), mask_BT.to(place)


@torch.no_grad()
def _pads_well(subject: Subject, prompts: Sequence[list[int]]) -> bool:
    """Whether a prompt beside a longer one gets the log-probabilities that it gets alone."""
    ids_BT, mask_BT = _padded(prompts, subject.place)
    if bool(mask_BT.all()):
        return True
    positions_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)
    together_V = subject.model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False, **(
        {"position_ids": positions_BT} if _takes_positions(subject.model) else {}
    )).logits[0, -1]  # fmt: skip
    alone_V = subject.model(input_ids=ids_BT[:1, -len(prompts[0]) :], use_cache=False).logits[0, -1]
    gap = (together_V.float().log_softmax(0) - alone_V.float().log_softmax(0)).abs().max()
    return bool(
        gap <= (1e-3 if together_V.dtype == torch.float32 else _PADDING_TOLERANCE) * alone_V.float().abs().max()
    )


def _takes_positions(model: Any) -> bool:
    import inspect

    return "position_ids" in inspect.signature(model.forward).parameters


class _KeyedDraw(LogitsProcessor):  # type: ignore[misc]
    """Turns the choice of the likeliest token into a draw, with each prompt's own noise."""

    def __init__(self, drawing: Drawing, numbers: Sequence[int]) -> None:
        self._drawing = drawing
        self._generators = [torch.Generator().manual_seed(drawing.seed * 1_000_003 + number) for number in numbers]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        drawing, logits_BV = self._drawing, scores.float() / self._drawing.temperature
        kept = min(drawing.top_k, logits_BV.shape[1])
        top_BK, ids_BK = logits_BV.topk(kept, dim=1)  # sorted, the likeliest first
        before_BK = top_BK.softmax(dim=1).cumsum(dim=1).roll(1, dims=1)
        before_BK[:, 0] = 0.0  # the likeliest always stays
        noise_BV = torch.stack([_gumbel(logits_BV.shape[1], generator) for generator in self._generators])
        drawn_BK = top_BK + noise_BV.to(logits_BV.device).gather(1, ids_BK)
        drawn_BK[before_BK >= drawing.top_p] = float("-inf")
        return torch.full_like(logits_BV, float("-inf")).scatter(1, ids_BK, drawn_BK)


def _gumbel(size: int, generator: torch.Generator) -> torch.Tensor:
    uniform = torch.rand(size, generator=generator, dtype=torch.float64).clamp(min=1e-300)
    return -(-uniform.log()).log().float()
