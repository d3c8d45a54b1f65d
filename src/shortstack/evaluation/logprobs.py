"""Log-probabilities of continuations, in batches of like length and bounded size, logits only where they are needed.

Legend: B rows of a batch, T tokens, N predicted tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from shortstack.data.collators import padded

_TOKENS_AT_A_TIME = 8192
_LOGITS_AT_A_TIME = 64 << 20  # numbers
_MOST_ROWS = 256


@torch.no_grad()
def continuation_logprobs(
    model: Any,
    requests: Sequence[tuple[list[int], list[int]]],
    *,
    max_length: int | None,
    device: torch.device,
    batch: int | None = None,
    advance: Callable[[int], object] = lambda _: None,
) -> list[tuple[float, bool]]:
    """For each (context, continuation) in tokens: the continuation's log-probability, and whether it is the greedy one.

    As lm-evaluation-harness defines it: the last token is not fed, and what is longer than `max_length` loses its left
    part. Requests that feed the same tokens (`yes` and `no` after one passage) share a row.
    """
    rows: dict[tuple[int, ...], list[int]] = {}
    for number, (context, continuation) in enumerate(requests):
        whole = (*context, *continuation)
        fed = (whole if max_length is None else whole[-(max_length + 1) :])[:-1]
        rows.setdefault(fed, []).append(number)
    found: list[tuple[float, bool]] = [(math.nan, False)] * len(requests)
    order = sorted(rows, key=len, reverse=True)
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    vocabulary = int(model.config.get_text_config().vocab_size)
    start = 0
    while start < len(order):
        longest = len(order[start])
        predicted = [
            max(len(requests[n][1]) for n in rows[fed]) for fed in order[start : start + (batch or _MOST_ROWS)]
        ]
        logits = vocabulary * (max(predicted) + 8 if keeps else longest)  # of one row
        taken = batch or max(1, min(_TOKENS_AT_A_TIME // longest, _LOGITS_AT_A_TIME // logits, len(predicted)))
        fed_rows = order[start : start + taken]
        start += taken
        ids_BT = padded(fed_rows, 0, left=False)  # what comes after changes nothing before it
        first = min(len(fed) - count for fed, count in zip(fed_rows, predicted[:taken], strict=True))
        given = {"logits_to_keep": longest - first} if keeps else {}
        logits_BTV = model(input_ids=ids_BT.to(device), use_cache=False, **given).logits
        left_out = longest - logits_BTV.shape[1]
        for place, fed in enumerate(fed_rows):
            for number in rows[fed]:
                continuation = requests[number][1]
                end = len(fed) - left_out
                found[number] = _scored(logits_BTV[place, end - len(continuation) : end], continuation)
            advance(len(rows[fed]))
        del logits_BTV
    return found


def _scored(logits_NV: torch.Tensor, continuation: list[int]) -> tuple[float, bool]:
    targets_N = torch.tensor(continuation, device=logits_NV.device)
    logprobs_NV = torch.log_softmax(logits_NV.float(), dim=-1)
    chosen_N = logprobs_NV.gather(1, targets_N[:, None])[:, 0]
    return float(chosen_N.sum()), bool((logits_NV.argmax(dim=-1) == targets_N).all())
