"""From logits to the negative log-likelihood of each token that is predicted.

Legend: B windows in a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch.nn import functional

_SMALL = 4 << 20  # numbers; up to here a second copy costs less than the passes in place


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
        largest = logits.amax(dim=1, keepdim=True)
        losses = logits.sub_(largest).exp_().sum(dim=1).log_().add_(largest[:, 0]).sub_(chosen)
    return losses.view(ids_BT.shape)[:, :-1].contiguous()
