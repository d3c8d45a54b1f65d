"""From logits to the negative log-likelihood of each token that is predicted.

Legend: B windows in a batch, T tokens, D hidden size, V vocabulary, R tokens of all windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.nn import functional

_NARROWER = 16  # columns
_SMALL = 4 << 20  # numbers; up to here a second copy costs less than the passes in place


def losses_over(
    model: Any,
    batches: Iterable[dict[str, Any]],
    loss: Callable[[Any, dict[str, Any]], torch.Tensor],
    device: torch.device,
) -> list[torch.Tensor]:
    """What `loss` gives of each batch: the loop of every measurement. No gradients, the model in evaluation mode.

    Args:
        model: left in the mode that it was in.
        batches: tensors by name, on any device; made as they are needed.
        loss: given the model and a batch.
        device: where the model is.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return [
                loss(model, {key: value.to(device) for key, value in batch.items() if hasattr(value, "to")})
                for batch in batches
            ]
    finally:
        model.train(was_training)


def token_nll(logits_BTV: torch.Tensor, ids_BT: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of tokens 1 to T-1 given those before them, [B, T-1], in nats, in float32.

    Without gradients large logits are overwritten: the caller must own them.
    """
    # The last position predicts nothing; it is dropped from the losses, because dropping it from the logits copies them.
    targets = ids_BT.roll(-1, dims=1).flatten()
    logits = logits_BTV.flatten(0, 1).float()
    if torch.is_grad_enabled() or logits.numel() <= _SMALL:
        losses = functional.cross_entropy(logits, targets, reduction="none")
    else:  # in place: log-softmax would take as much memory again
        chosen = logits.gather(1, targets[:, None])[:, 0]
        losses = _log_sum_exp_(logits).sub_(chosen)
    return losses.view(ids_BT.shape)[:, :-1].contiguous()


def head_nll(
    hidden_BTD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, ids_BT: torch.Tensor, at_once: int
) -> torch.Tensor:
    """The same from what goes into a linear head: logits are made, and reduced, for a slice of the vocabulary at a time.

    Whole logits are far larger than a cache and are gone through four times; a slice stays in it. No gradients.

    Args:
        at_once: how many logits are made at a time.
    """
    targets_R = ids_BT.roll(-1, dims=1).flatten()
    hidden_RD = hidden_BTD.flatten(0, 1)
    vocabulary, width = len(weight_VD), max(1, at_once // len(targets_R))
    chosen_R = torch.zeros(len(targets_R), device=ids_BT.device)
    sums: list[torch.Tensor] = []
    first = 0
    while first < vocabulary:
        part = slice(first, first + width)
        logits = functional.linear(hidden_RD, weight_VD[part], bias_V[part] if bias_V is not None else None).float()
        place_R = (targets_R - first).clamp(0, logits.shape[1] - 1)
        found_R = logits.gather(1, place_R[:, None])[:, 0]
        chosen_R = torch.where(place_R == targets_R - first, found_R, chosen_R)
        sums.append(_log_sum_exp_(logits))
        del logits, found_R
        first = part.stop
        # A little less each time: freed aligned memory does not hold the same again, and would add up to the whole logits.
        if width > 64 * _NARROWER:
            width -= _NARROWER
    losses_R = torch.logsumexp(torch.stack(sums), dim=0) - chosen_R
    return losses_R.view(ids_BT.shape)[:, :-1].contiguous()


def loss_scale(windows: int, seq_len: int, batch: int | None) -> torch.Tensor:
    """What each window's summed NLL is multiplied by, so that the gradient is the sum of those of the batches' means.

    Args:
        batch: windows per batch, each with its own mean loss; None for one mean over all.
    """
    size = batch or windows
    sizes = [min(size, windows - start) for start in range(0, windows, size) for _ in range(min(size, windows - start))]
    return torch.tensor([1.0 / (count * (seq_len - 1)) for count in sizes], dtype=torch.float64)


def _log_sum_exp_(logits_RV: torch.Tensor) -> torch.Tensor:
    """log of the sum of exp over each row, [R]; the logits are overwritten."""
    largest = logits_RV.amax(dim=1, keepdim=True).clamp_(min=torch.finfo(logits_RV.dtype).min)  # a row may be all -inf
    return logits_RV.sub_(largest).exp_().sum(dim=1).log_().add_(largest[:, 0])


def head_gradient(
    hidden_BTD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    ids_BT: torch.Tensor,
    scale_B: torch.Tensor,
) -> torch.Tensor:
    """d (sum over windows of scale * the window's summed loss) / d what goes into a linear head, [B, T, D].

    In closed form: (softmax of the logits - 1 at the target) times the weight, in the memory of the logits.
    """
    logits = functional.linear(hidden_BTD, weight_VD, bias_V)
    difference = torch.softmax(logits.float(), dim=-1)
    difference.scatter_add_(-1, ids_BT.roll(-1, dims=1)[..., None], difference.new_full((*ids_BT.shape, 1), -1.0))
    difference[:, -1] = 0  # the last position predicts nothing
    difference *= scale_B.to(difference)[:, None, None]
    return (difference.to(weight_VD.dtype).flatten(0, 1) @ weight_VD).view_as(hidden_BTD)
