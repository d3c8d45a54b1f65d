"""The outcome of a retraining run: figures before, after and of the dense model, in one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.artifacts.training import before_and_after_table
from shortstack.artifacts.units import tokens_hash
from shortstack.common.formatting import count, seconds, size
from shortstack.common.progress import Progress
from shortstack.common.shown import Shown
from shortstack.errors import ShortstackError

if TYPE_CHECKING:
    from shortstack.checkpoint.reader import Checkpoint
    from shortstack.retraining.options import TrainingOptions


@dataclass(frozen=True, repr=False)
class RetrainResult(Shown):
    """The outcome of a completed retraining run.

    Attributes:
        out: The new checkpoint.
        method: The method: lora, cpt, distill or local.
        steps: The number of optimizer steps.
        tokens: The number of tokens that the run was trained on, without padding.
        seconds: The wall-clock time of the training in seconds.
        rows: The parameters and figures of the models "before", "after" and, if it is known, "dense". `validation` is
            the loss in nats per predicted token, `ppl:NAME` the perplexity of a text; lower is better for both.
        adapter: The directory of the adapter, for LoRA.
        notes: What a reader of the table should know.
    """

    out: Path
    method: str
    steps: int
    tokens: int
    seconds: float
    rows: dict[str, dict[str, Any]]
    adapter: Path | None = None
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "schema": 1,
            "out": str(self.out),
            "method": self.method,
            "steps": self.steps,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "models": self.rows,
            "adapter": str(self.adapter) if self.adapter else None,
            "notes": self.notes,
        }

    def table_rows(self) -> list[dict[str, Any]]:
        """One row for each model: before, after, dense."""
        return [{"model": which, "parameters": row["parameters"], **row["figures"]} for which, row in self.rows.items()]

    def to_text(self) -> str:
        """The table, and the paths of the outputs."""
        lines = [
            f"{self.out}: retrained ({self.method}) for {self.steps} steps, {self.tokens} tokens, in {seconds(self.seconds)}",
            before_and_after_table(self.rows).to_text(),
        ]
        if self.adapter:
            lines.append(f"the adapter alone is in {self.adapter}")
        return "\n".join([*lines, *self.notes])


@dataclass(frozen=True, repr=False)
class RetrainEstimate(Shown):
    """The forecast of a retraining run (`--dry-run`).

    Attributes:
        method: The method: lora, cpt, distill or local.
        trained: The number of parameters that would be trained.
        parameters: The number of all parameters.
        steps: The number of optimizer steps of the whole run.
        tokens: The number of tokens of the whole run.
        data: The data to train on.
        bytes_per_device: The memory for weights, gradients, optimizer state and, as measured, everything else, in
            bytes.
        seconds_per_step: The time of a step in seconds, from three measured steps.
        processes: The number of processes that share the work.
        notes: What a reader of the figures should know.
    """

    method: str
    trained: int
    parameters: int
    steps: int
    tokens: int
    data: dict[str, Any]
    bytes_per_device: dict[str, int]
    seconds_per_step: float
    processes: int = 1
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return {"schema": 1, **self.__dict__, "seconds": self.steps * self.seconds_per_step}

    def to_text(self) -> str:
        """What a person reads on the terminal."""
        memory = self.bytes_per_device
        rows = [
            ("trained", f"{count(self.trained)} of {count(self.parameters)} parameters"),
            ("data", str(self.data.get("source"))),
            ("steps", str(self.steps)),
            ("tokens", count(self.tokens)),
            *((f"memory: {name}", size(value)) for name, value in memory.items()),
            ("memory per device", size(sum(memory.values()))),
            ("time", f"{seconds(self.steps * self.seconds_per_step)} ({self.seconds_per_step:.2f} s a step, measured)"),
        ]
        width = max(len(name) for name, _ in rows)
        lines = [
            f"dry run of {self.method}: nothing was trained",
            *(f"  {name:{width}}  {value}" for name, value in rows),
        ]
        return "\n".join([*lines, *self.notes])


# Given a checkpoint: its figures.
Measure = Callable[["Checkpoint"], dict[str, float]]


def before_and_after(
    before: Checkpoint, after: Checkpoint | None, options: TrainingOptions, progress: Progress, measure: Measure
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The same figures of what is on the disk before and after a run and of the dense model, all measured in one way.

    Returns:
        (figures of each model by the name of its row, why a row is missing).
    """
    from shortstack.families.open_model import dense_of

    notes: list[str] = []
    chosen = {"before": before}
    if after is not None:
        chosen["after"] = after
    dense, note = dense_of(before, options.dense, progress)
    if dense is not None and (reason := _other_tokens(before, dense, options)):
        note = f"{dense.source} {reason}, so its figures are of another unit"
        dense = None
    if dense is not None:
        chosen["dense"] = dense
    elif note:
        notes.append(f"{note}; it is not in the table")
    rows = {
        which: {"parameters": checkpoint.parameters(), "figures": measure(checkpoint)}
        for which, checkpoint in chosen.items()
    }
    return rows, notes


def _other_tokens(before: Checkpoint, dense: Checkpoint, options: TrainingOptions) -> str:
    """Why the dense model cannot be measured on tokens of the pruned one; empty where it can."""
    from shortstack.data.tokenizer import load_tokenizer
    from shortstack.evaluation.prompts import GenerationRequest

    if dense.embedding_rows < before.embedding_rows:
        return f"has {dense.embedding_rows} tokens, {before.source} has {before.embedding_rows}"
    try:
        both = [load_tokenizer(one, trust_remote_code=options.trust_remote_code) for one in (before, dense)]
    except ShortstackError:
        return ""  # trained on token ids: there is nothing to compare
    texts = [row["text"] for row in GenerationRequest.read(probes=0).prompts]
    ours, theirs = (tokens_hash(tokenizer(text, verbose=False)["input_ids"] for text in texts) for tokenizer in both)
    return "" if ours == theirs else f"splits text into other tokens than {before.source}"
