"""The options of retraining (how a run goes, its steps, an adapter, a teacher), and all numbers of one run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from shortstack.checkpoint.options import CheckpointOptions, ComputeOptions
from shortstack.common.option_values import Amount, Listed
from shortstack.common.options import Options, expect, refuse_idle
from shortstack.data.row_prompt import PromptRule
from shortstack.engine.select import MemoryMode
from shortstack.errors import UsageError
from shortstack.runtime.devices import DType

SaveDType = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class TrainingOptions(CheckpointOptions):
    """How a retraining run works, whatever it trains.

    Attributes:
        max_steps: Stop after this many optimizer steps, even if data remain.
        save_every: Save the state after each of this many steps. A killed run resumes from the last one.
        eval_every: Evaluate after each of this many steps, on the validation set and on the texts of `eval_data`.
        log_every: Show a line of progress after each of this many steps.
        validation: The number of rows or windows in the validation set. By default they are 2000 rows or 200 windows,
            or a tenth of few rows.
        eval_data: Measure the perplexity of these texts during training, separated by commas (windows of 128 tokens, as
            published).
        eval_windows: Use at most this many windows of each text of `eval_data`. By default all are used.
        dense: The dense checkpoint, for the table at the end. By default it is the one that shortstack.json names.
        dtype: The data type to compute in. `auto` is float32 on a CPU, and bfloat16 on a GPU that supports it.
        device: The device to train on: `cpu`, `cuda` or `mps`. `auto` is CUDA if available, else the GPU of a Mac
            (`mps`), else the CPU.
        seed: The seed of the validation split, the order of the data, the dropout and the initial adapter.
        save_dtype: The data type to store the result in. By default each tensor keeps its type in the checkpoint.
        gradient_checkpointing: Save memory by computing activations twice. By default this is on when whole models are
            trained on a GPU.
        workers: The number of processes that prepare batches. They divide the work of each step among them.
        report_to: Report to these trackers, besides metrics.jsonl: `tensorboard`, `trackio` or `wandb`, separated by
            commas.
        dry_run: Train nothing. Show what would be trained, the tokens, steps and memory, and the time estimated from
            three measured steps.
        restart: Start from the first step, even where a killed run could resume.
        weights_only_resume: Resume from a saved state without optimizer, schedule or random state, and start these
            afresh.
        force: Replace an output that shortstack made before, and resume a run even if its settings were different.
    """

    max_steps: int | None = None
    save_every: int = 200
    eval_every: int = 100
    log_every: int = 10
    validation: int | None = None
    eval_data: Listed | None = None
    eval_windows: int | None = None
    dense: str | None = None
    dtype: DType = "auto"
    device: str = "auto"
    seed: int = 42
    save_dtype: SaveDType | None = None
    gradient_checkpointing: bool | None = None
    workers: int = 0
    report_to: Listed | None = None
    dry_run: bool = False
    restart: bool = False
    weights_only_resume: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        for name, least in (("max_steps", 1), ("save_every", 1), ("eval_every", 1), ("log_every", 1),
                            ("validation", 0), ("eval_windows", 1), ("workers", 0)):  # fmt: skip
            value = getattr(self, name)
            expect(value is None or value >= least, name, value, f"at least {least}")
        if self.eval_data is None:
            refuse_idle(self, ["eval_windows"], "without --eval-data")
        if self.restart:
            refuse_idle(self, ["weights_only_resume"], "with --restart: nothing is resumed")


@dataclass(frozen=True)
class LoRA(Options):
    """Settings of an adapter (Hu et al. 2021); the defaults are the published ones.

    Attributes:
        rank: The rank of the adapter.
        alpha: The adapter is scaled by `alpha` / `rank`.
        dropout: The dropout rate of the adapter's input.
        target_modules: The linear layers that get an adapter, such as `q_proj,v_proj`. By default all linear layers of
            the blocks do; in Llama-like models these are the published seven.
    """

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.05
    target_modules: Listed | None = None

    def __post_init__(self) -> None:
        expect(self.rank >= 1, "rank", self.rank, "at least 1")
        expect(0 < self.alpha < math.inf, "alpha", self.alpha, "a number above 0")
        expect(0 <= self.dropout < 1, "dropout", self.dropout, "a share from 0 to below 1")
        if self.target_modules is not None:
            names = self.target_modules.split(",")
            fits = all(name and name == name.strip() for name in names) and len(set(names)) == len(names)
            expect(fits, "target_modules", repr(self.target_modules), "names separated by commas, each once")

    def adapts(self, layer: str) -> bool:
        """Whether the linear layer with this name gets an adapter; the end of its name is enough."""
        chosen = self.target_modules
        return chosen is None or any(f".{layer}".endswith(f".{name}") for name in chosen.split(","))


@dataclass(frozen=True)
class AdapterUse(Options):
    """What an adapter is trained on, and what becomes of it.

    Attributes:
        merge: Fold the adapter into the weights. With `merge=False`, OUT holds only the adapter.
        load_in_4bit: Hold the base weights in 4 bits during training (QLoRA). This needs bitsandbytes.
    """

    merge: bool = True
    load_in_4bit: bool = False


@dataclass(frozen=True)
class Steps(Options):
    """The steps of the optimizer, whatever is trained.

    Attributes:
        lr: The learning rate at the end of the warm-up.
        batch: The number of rows or windows in a step, over all processes.
        micro_batch: The number of rows or windows at a time in one process.
        warmup: The number of steps until the learning rate is reached. A shorter run uses a tenth of its steps instead.
    """

    lr: float = 1e-4
    batch: int = 64
    micro_batch: int = 4
    warmup: int = 100

    def __post_init__(self) -> None:
        expect(0 < self.lr < 1, "lr", self.lr, "a number between 0 and 1, such as 1e-4")
        expect(self.warmup >= 0, "warmup", self.warmup, "at least 0 steps")
        for name in ("seq_len", "cutoff"):
            expect(getattr(self, name, 2) >= 2, name, getattr(self, name, 2), "at least 2 tokens")
        decay, epochs = getattr(self, "weight_decay", 0), getattr(self, "epochs", 1)
        expect(0 <= decay < math.inf, "weight_decay", decay, "a number from 0 up")
        expect(0 < epochs < math.inf, "epochs", epochs, "a number above 0")
        if getattr(self, "tokens", None) is not None and hasattr(self, "epochs"):
            refuse_idle(self, ["epochs"], "with --tokens, which says how much is trained on")


@dataclass(frozen=True)
class RowSteps(Steps):
    """Steps over rows of instructions.

    Attributes:
        epochs: The number of passes over the data.
        tokens: Train on this many tokens, such as `10M`, instead of `epochs`.
        cutoff: Truncate rows after this many tokens. For text, this is the number of tokens in a window.
        group_by_length: Put rows of similar length into one batch. This needs less padding and changes the order.
    """

    epochs: float = 2
    tokens: Amount | None = None
    cutoff: int = 256
    group_by_length: bool = False


@dataclass(frozen=True)
class TextSteps(Steps):
    """Steps over windows of packed text; the defaults are those published with the CPT checkpoints of Shortened LLaMA.

    Attributes:
        tokens: Train on this many tokens, such as `1B`. By default it is one pass over the text.
        seq_len: The number of tokens in a window; at most the number of the model's positions.
        weight_decay: The weight decay of AdamW.
        isolate_documents: Keep attention within a document, in families where positions that start again achieve this.
    """

    batch: int = 512
    micro_batch: int = 2
    tokens: Amount | None = None
    seq_len: int = 2048
    weight_decay: float = 0.1
    isolate_documents: bool = True


@dataclass(frozen=True)
class DistillationSteps(Steps):
    """Steps of a student.

    Attributes:
        epochs: The number of passes over the data.
        tokens: Train on this many tokens, such as `10M`, instead of `epochs`.
        seq_len: The number of tokens in a window, or the length after which a row is truncated; at most the number of
            the model's positions.
        weight_decay: The weight decay of AdamW.
        isolate_documents: Keep attention within a document, in families where positions that start again achieve this.
    """

    epochs: float = 1
    tokens: Amount | None = None
    seq_len: int = 2048
    weight_decay: float = 0.1
    isolate_documents: bool = True


@dataclass(frozen=True)
class Teaching(Options):
    """The teacher, and what a student learns from it.

    Attributes:
        teacher: The dense checkpoint, which runs beside the student. By default it is the one that shortstack.json
            names.
        offline: Train on the logits in this folder, which `shortstack teach` wrote, instead of `teacher` and `data`.
        temperature: The temperature that softens both distributions. By default it is 1; with `offline` it is the
            temperature of the folder.
        kl_weight: The weight of the KL divergence to the teacher's distribution.
        loss_weight: The weight of the next-token loss.
        hidden_weight: The weight of the distance between hidden states. It cannot be used with `offline`.
    """

    teacher: str | None = None
    offline: Path | None = None
    temperature: float | None = None
    kl_weight: float = 1.0
    loss_weight: float = 0.5
    hidden_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.temperature is not None:
            expect(0 < self.temperature < math.inf, "temperature", self.temperature, "a number above 0")
        weights = (self.kl_weight, self.loss_weight, self.hidden_weight)
        if not all(0 <= weight < math.inf for weight in weights) or not sum(weights) > 0:
            raise UsageError(
                f"--kl-weight {self.kl_weight} --loss-weight {self.loss_weight} --hidden-weight {self.hidden_weight}: "
                "expected none below 0, and one above"
            )
        if self.kl_weight == 0:
            refuse_idle(self, ["temperature"], "with --kl-weight 0")


@dataclass(frozen=True)
class TeachOptions(ComputeOptions, CheckpointOptions):
    """Which logits of a teacher are cached, on which rows or windows, and how the run computes.

    Attributes:
        top_k: The number of tokens whose log-probabilities are kept at every position.
        temperature: Divide the logits by this temperature. The student is trained with the same temperature.
        tokens: Use this many tokens of a text, such as `10M`. By default it is one pass over the text.
        seq_len: The number of tokens in a window or row; at most the number of the teacher's positions.
        validation: The number of windows or rows in the validation set. By default it is that of `shortstack retrain`.
        isolate_documents: Keep attention within a document.
        micro_batch: The number of rows at a time.
        memory: How much of the teacher is in memory: `streamed` holds two blocks at a time, `resident` the whole model.
            `auto` is `resident` if the model fits.
        seed: The seed of the order of the text and of the validation split.
        force: Replace an existing output that shortstack made.
    """

    LAST: ClassVar[tuple[str, ...]] = ("dtype", "device", "seed", "force", *CheckpointOptions.LAST)

    top_k: int = 64
    temperature: float = 1.0
    tokens: Amount | None = None
    seq_len: int = 2048
    validation: int | None = None
    isolate_documents: bool = True
    micro_batch: int = 4
    memory: MemoryMode = "auto"
    seed: int = 42
    force: bool = False

    def __post_init__(self) -> None:
        expect(self.top_k >= 1, "top_k", self.top_k, "at least 1")
        expect(0 < self.temperature < math.inf, "temperature", self.temperature, "a number above 0")
        expect(self.seq_len >= 2, "seq_len", self.seq_len, "at least 2 tokens")
        expect(self.micro_batch >= 1, "micro_batch", self.micro_batch, "at least 1")
        expect(self.validation is None or self.validation >= 0, "validation", self.validation, "at least 0")


@dataclass(frozen=True)
class Hyperparameters:
    """All numbers of one run: what is trained, on how much, how fast.

    Attributes:
        method: lora, cpt, distill or local.
        train: `lora`, or what `trainable.set_trainable` takes.
        learning_rate, schedule, warmup_steps: the rate rises over the warm-up, then falls to nothing.
        betas, weight_decay: of AdamW.
        epochs, tokens: how much is trained on; tokens count more.
        batch, micro_batch: rows per step over all processes, and at a time in one.
        seq_len: tokens of a window, or the cutoff of a row.
        keep: the saved step with the lowest validation loss, or the last.
        lora: settings of the adapter, where one is trained.
        prompt: what stands around an instruction, and what the loss counts; None is as published.
        distillation: weights and temperature, and the teacher's fingerprint.
        local: which blocks are trained on their own and what is compared, and the dense model's fingerprint.
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
    prompt: PromptRule | None = None
    group_by_length: bool = False
    isolate_documents: bool = True
    load_in_4bit: bool = False
    distillation: dict[str, Any] | None = None
    local: dict[str, Any] | None = None


def parse_tokens(text: str | None) -> int | None:
    """`1B` -> 1000000000; None where nothing was said.

    Raises:
        UsageError: no such number, or none at all.
    """
    if text is None:
        return None
    from shortstack.pruning.budget import parse_amount

    tokens = parse_amount(text, "--tokens", "tokens")
    if tokens < 1:
        raise UsageError(f"--tokens {text}: expected at least 1")
    return tokens
