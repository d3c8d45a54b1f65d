"""All numbers of one retraining run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from shortstack.errors import UsageError

if TYPE_CHECKING:
    from shortstack.retraining.options import LoRA


@dataclass(frozen=True)
class Hyperparameters:
    """All numbers of one run: what is trained, on how much, how fast.

    Attributes:
        method: lora, cpt or distill.
        train: `lora`, or what `trainable.set_trainable` takes.
        learning_rate, schedule, warmup_steps: the rate rises over the warm-up, then falls to nothing.
        betas, weight_decay: of AdamW.
        epochs, tokens: how much is trained on; tokens count more.
        batch, micro_batch: rows per step over all processes, and at a time in one.
        seq_len: tokens of a window, or the cutoff of a row.
        keep: the saved step with the lowest validation loss, or the last.
        lora: settings of the adapter, where one is trained.
        distillation: weights and temperature, and the teacher's fingerprint.
    """

    method: str
    train: str
    learning_rate: float
    schedule: Literal["linear", "cosine"]
    warmup_steps: int
    batch: int
    micro_batch: int
    seq_len: int
    keep: Literal["best", "last"]
    epochs: float | None = None
    tokens: int | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    lora: LoRA | None = None
    group_by_length: bool = False
    isolate_documents: bool = True
    load_in_4bit: bool = False
    distillation: dict[str, Any] | None = None


def parse_tokens(text: str | None) -> int | None:
    """`1B` -> 1000000000; None where nothing was said.

    Raises:
        UsageError: no such number, or none at all.
    """
    if text is None:
        return None
    from shortstack.pruning.plan import parse_amount

    tokens = parse_amount(text, "--tokens", "tokens")
    if tokens < 1:
        raise UsageError(f"--tokens {text}: expected at least 1")
    return tokens
