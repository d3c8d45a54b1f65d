"""What is watched in training and compared at its end: the loss on the validation set, the perplexity of given texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.artifacts.results import perplexity
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.progress import Progress
from shortstack.data.calibration import check_windows
from shortstack.data.collators import Batch, predicted_tokens, window_batches
from shortstack.data.instructions import IGNORED
from shortstack.data.ppl_datasets import evaluation_texts
from shortstack.errors import ShortstackError
from shortstack.evaluation.ppl import cut_windows
from shortstack.runtime.devices import exact_place
from shortstack.runtime.distributed import Process

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from shortstack.retraining.batch_states import BatchModel

_PPL_WINDOW = 128  # tokens, as published
_WINDOWS_AT_A_TIME = 8


@dataclass(frozen=True)
class ValidationSet:
    """Batches to measure a model on; none of them is trained on.

    Attributes:
        validation: of the training data's own kind.
        texts: name -> batches of windows.
        described: what a record says about the texts.
    """

    validation: list[Batch] = field(repr=False)
    texts: dict[str, list[Batch]] = field(default_factory=dict, repr=False)
    described: dict[str, Any] = field(default_factory=dict)

    def measure(self, model: Any, device: torch.device, process: Process | None = None) -> dict[str, float]:
        """{"validation": mean NLL per predicted token, "ppl:NAME": perplexity of each text}.

        Processes that train together measure a share each; every one of them must call this.
        """
        return self.figures(lambda batches: mean_nll(model, batches, device, process))

    def figures(self, nll: Callable[[Sequence[Batch]], float]) -> dict[str, float]:
        """The same, where `nll` gives the mean NLL per predicted token of batches."""
        found = {}
        if any(predicted_tokens(batch) for batch in self.validation):  # rows that are cut off may predict nothing
            found["validation"] = nll(self.validation)
        for name, batches in self.texts.items():
            found[f"ppl:{name}"] = perplexity(nll(batches))
        return found


def mean_nll(model: Any, batches: Sequence[Batch], device: torch.device, process: Process | None = None) -> float:
    """Mean negative log-likelihood over the predicted tokens of all batches, in nats."""
    import torch

    from shortstack.engine.load import losses_over
    from shortstack.retraining.losses import NextToken

    process = process or Process()
    # Every process runs as many batches: sharded models gather their weights together.
    numbers = range(process.rank, process.world * math.ceil(len(batches) / process.world), process.world)
    own = [batches[min(number, len(batches) - 1)] for number in numbers]
    losses = losses_over(
        model, own, lambda model, batch: exact_place(NextToken()(model, batch)["loss"]).double(), device
    )
    sums = exact_place(torch.zeros(2, device=device)).double()
    for number, nll, batch in zip(numbers, losses, own, strict=True):
        if number < len(batches):
            sums += torch.stack([nll, torch.tensor(predicted_tokens(batch), dtype=torch.float64, device=sums.device)])
    if process.world > 1:
        torch.distributed.all_reduce(sums)
    return float(sums[0] / sums[1])


def streamed_nll(model: BatchModel, batches: Sequence[Batch], file: Path | None = None) -> float:
    """The same of a model whose blocks come in one at a time.

    Args:
        model: of one process.
        batches: of any shape.
        file: where hidden states lie meanwhile; None keeps them in memory.
    """
    states = model.embedded(batches, file)
    try:
        model.advance(batches, states, range(model.checkpoint.depth))
        summed, predicted = 0.0, 0
        for number, batch in enumerate(batches):
            device = model.skeleton.device
            nll_BT = model.skeleton.head.nll(states[number].to(device), batch["input_ids"].to(device)).cpu()
            chosen_BT = batch["targets"][:, :-1] != IGNORED
            summed += float(exact_place(nll_BT[chosen_BT]).double().sum())
            predicted += int(chosen_BT.sum())
    finally:
        states.close()
    return summed / predicted


def text_batches(
    sources: str | None,
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: Checkpoint,
    *,
    limit: int | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, list[Batch]], dict[str, Any]]:
    """(name -> batches, name -> what a record says) of texts to follow: windows of 128, BOS once in front, as published."""
    batches: dict[str, list[Batch]] = {}
    described: dict[str, Any] = {}
    for corpus in evaluation_texts(sources or "", None, progress):
        source = corpus.source
        if not corpus.documents:
            raise ShortstackError(f"{source}: perplexity needs text, these are rows of another kind")
        length = min(_PPL_WINDOW, checkpoint.positions or _PPL_WINDOW)
        ids = list(tokenizer("\n\n".join(corpus.documents), add_special_tokens=False, verbose=False)["input_ids"])
        windows = cut_windows(ids, tokenizer.bos_token_id, length, bos_every=False)[:limit]
        if not windows:
            raise ShortstackError(f"{source}: a window of {length} tokens needs {length} tokens, found {len(ids)}")
        check_windows(checkpoint, windows)
        name = Path(source).name
        batches[name] = list(window_batches(windows, _WINDOWS_AT_A_TIME))
        described[name] = {**corpus.described(), "windows": len(windows), "seq_len": length}
    return batches, described
