"""The losses of training: the next token's loss, and the distance to a teacher (distillation).

Every part is a sum over the tokens that are predicted; the trainer divides by their number over all processes.

Legend: B rows, T tokens, V vocabulary, N predicted tokens, K top tokens of the teacher, D width.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.nn import functional

from shortstack.data.collators import Batch
from shortstack.data.instructions import IGNORED
from shortstack.errors import ShortstackError

_ARGUMENTS = ("input_ids", "attention_mask", "position_ids")
_ROWS_AT_A_TIME = 1024  # predicted tokens whose logits are compared at a time, in float32


class NonFiniteLossError(ShortstackError):
    """The loss of a step is NaN or infinite."""

    def __init__(self, step: int, loss: float, saved_steps: Sequence[int]) -> None:
        kept = f"the checkpoint of step {saved_steps[-1]} is kept" if saved_steps else "no checkpoint was saved before"
        super().__init__(
            f"the loss of step {step} is {loss}: training stopped; {kept}",
            hint="a lower --lr, --dtype bfloat16 instead of float16, or look at the data; then --restart",
        )


class Objective(Protocol):
    """Sums of losses over a batch, by name; `loss` is the one that is minimized."""

    def __call__(self, model: Any, batch: Batch) -> dict[str, torch.Tensor]:
        """Run the model on a batch."""


def logits_of(model: Any, batch: Batch) -> torch.Tensor:
    """Logits of a batch, [B, T, V]; arguments that the model does not take are left out."""
    given = {key: batch[key] for key in _ARGUMENTS if key in batch and key in _accepted(model)}
    logits: torch.Tensor = model(**given, use_cache=False).logits
    return logits


def _accepted(model: Any) -> tuple[str, ...]:
    inner = model
    while hasattr(inner, "module"):  # DistributedDataParallel
        inner = inner.module
    if hasattr(inner, "get_base_model"):  # PEFT passes everything on
        inner = inner.get_base_model()
    parameters = inspect.signature(inner.forward).parameters
    return tuple(key for key in _ARGUMENTS if key in parameters)


@dataclass(frozen=True)
class NextToken:
    """The negative log-likelihood of the tokens that are predicted."""

    def __call__(self, model: Any, batch: Batch) -> dict[str, torch.Tensor]:
        """{"loss": summed NLL, in nats}."""
        logits_NV, targets_N = _predicting(logits_of(model, batch), batch)
        return {"loss": functional.cross_entropy(logits_NV.float(), targets_N, reduction="sum")}


def _predicting(logits_BTV: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and targets at the positions that predict something."""
    targets_BT = batch["targets"]
    chosen_BT = targets_BT != IGNORED
    return logits_BTV[chosen_BT], targets_BT[chosen_BT]


@dataclass(frozen=True)
class Distillation:
    """KL(teacher || student) on logits, the next token's loss, and the distance of hidden states, each with a weight.

    Hidden states are compared where a surviving block stands in the teacher: what the student's block gives against what
    its original gives in the dense model, as squared distance relative to the teacher's squared length.

    Attributes:
        temperature: both distributions are softened by it; the KL is multiplied by its square, so that gradients keep
            their size (Hinton et al. 2015).
        kl_weight, loss_weight, hidden_weight: of the three parts.
        teacher: the dense model; None where its top logits come with the batch (`teaching.py`).
        block_pairs: (student's block, its original in the teacher), as modules.
    """

    temperature: float = 1.0
    kl_weight: float = 1.0
    loss_weight: float = 0.5
    hidden_weight: float = 0.0
    teacher: Any = None
    block_pairs: Sequence[tuple[Any, Any]] = field(default=(), repr=False)

    def __call__(self, model: Any, batch: Batch) -> dict[str, torch.Tensor]:
        """{"loss": weighted sum, "kl", "nll", and "hidden" where it counts}."""
        matched = self.block_pairs if self.hidden_weight else ()
        with _outputs([pair[0] for pair in matched]) as ours, _outputs([pair[1] for pair in matched]) as theirs:
            logits_NV, targets_N = _predicting(logits_of(model, batch), batch)
            if self.teacher is not None:
                with torch.no_grad():
                    taught_NV, _ = _predicting(logits_of(self.teacher, batch), batch)
        parts = {"nll": functional.cross_entropy(logits_NV.float(), targets_N, reduction="sum")}
        if self.teacher is not None:
            parts["kl"] = in_parts(full_kl, logits_NV, taught_NV, temperature=self.temperature)
        else:
            chosen_BT = batch["targets"] != IGNORED
            top = (batch["top_ids"][chosen_BT].long(), batch["top_logprobs"][chosen_BT].float())
            parts["kl"] = in_parts(top_k_kl, logits_NV, *top, temperature=self.temperature)
        loss = self.kl_weight * parts["kl"] + self.loss_weight * parts["nll"]
        if matched:
            chosen_BT = batch["targets"] != IGNORED
            distances = [relative_distance(a[chosen_BT], b[chosen_BT]).sum() for a, b in zip(ours, theirs, strict=True)]
            parts["hidden"] = torch.stack(distances).mean()
            loss = loss + self.hidden_weight * parts["hidden"]
        return {"loss": loss, **{name: value.detach() for name, value in parts.items()}}


def in_parts(measure: Any, *tensors: torch.Tensor, temperature: float) -> torch.Tensor:
    """A sum over rows, so many rows at a time that their float32 logits stay small."""
    parts = zip(*(torch.split(tensor, _ROWS_AT_A_TIME) for tensor in tensors), strict=True)
    total: torch.Tensor = sum((measure(*part, temperature=temperature) for part in parts), tensors[0].new_zeros(()))
    return total.float()


def full_kl(student_NV: torch.Tensor, teacher_NV: torch.Tensor, *, temperature: float) -> torch.Tensor:
    """Sum over tokens of KL(teacher || student) at a temperature, times its square, in nats."""
    ours = functional.log_softmax(student_NV.float() / temperature, dim=-1)
    theirs = functional.log_softmax(teacher_NV.float() / temperature, dim=-1)
    return functional.kl_div(ours, theirs, reduction="sum", log_target=True) * temperature**2


def top_k_kl(
    student_NV: torch.Tensor, top_ids_NK: torch.Tensor, top_logprobs_NK: torch.Tensor, *, temperature: float
) -> torch.Tensor:
    """The same, from the teacher's top tokens alone: all others count as one.

    Never more than the full KL (merging outcomes cannot raise it), and equal to it where K is the whole vocabulary.

    Args:
        student_NV: the student's logits.
        top_ids_NK: the teacher's top tokens.
        top_logprobs_NK: their log-probabilities over the whole vocabulary, at this temperature.
        temperature: what the student's logits are divided by.
    """
    ours_NV = functional.log_softmax(student_NV.float() / temperature, dim=-1)
    ours_NK = ours_NV.gather(1, top_ids_NK)
    probabilities_NK = top_logprobs_NK.exp()
    kl = (probabilities_NK * (top_logprobs_NK - ours_NK)).sum()
    if top_ids_NK.shape[1] < student_NV.shape[1]:
        tiny = torch.finfo(torch.float32).tiny
        their_rest_N = (1 - probabilities_NK.sum(dim=1)).clamp(min=0)
        our_rest_N = ours_NV.scatter(1, top_ids_NK, float("-inf")).logsumexp(dim=1)
        kl = kl + (their_rest_N * (their_rest_N.clamp(min=tiny).log() - our_rest_N)).sum()
    return kl * temperature**2


def relative_distance(ours_ND: torch.Tensor, theirs_ND: torch.Tensor) -> torch.Tensor:
    """|ours - theirs|^2 / |theirs|^2 of each row, [N], in float32."""
    theirs_ND = theirs_ND.float()
    return (ours_ND.float() - theirs_ND).square().sum(dim=-1) / theirs_ND.square().sum(dim=-1).clamp(min=1e-12)


@contextlib.contextmanager
def _outputs(blocks: Sequence[Any]) -> Iterator[list[torch.Tensor]]:
    """Within, what each block gives is appended: hidden states at the block, before the final norm."""
    found: list[torch.Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
