"""Where and in what precision a run is computed, alone or among several processes, and what the Trainer is told of it."""

from __future__ import annotations

import gc
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from shortstack.checkpoint.reader import Checkpoint
from shortstack.engine.load import from_directory, load_model, refuse_missing
from shortstack.errors import ShortstackError, UsageError, did_you_mean, first_line
from shortstack.retraining.options import TrainingOptions
from shortstack.runtime.devices import DType, pick_device, pick_dtype
from shortstack.runtime.distributed import Process
from shortstack.runtime.private_names import forget_processes, shard_on_cpu
from shortstack.runtime.stopwatch import now

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from shortstack.data.collators import Sharding
    from shortstack.retraining.options import Hyperparameters

_TRACKERS = ("tensorboard", "trackio", "wandb")

Parallelism = Literal["one process", "DDP", "FSDP2"]


@dataclass(frozen=True)
class Place:
    """Device and precision.

    Attributes:
        device: of this process.
        dtype: what products are computed in; weights that are trained are kept in float32 beside it.
        parallelism: how several processes share the model.
        owns_group: the group of processes was made for this run; else it stays for what comes after it.
    """

    device: torch.device
    dtype: torch.dtype
    parallelism: Parallelism
    owns_group: bool = True

    @classmethod
    def find(cls, device: str, dtype: DType, checkpoint: Checkpoint, process: Process) -> Place:
        """The device and precision that the options mean in this process.

        Raises:
            UsageError: a precision that nothing is trained in, or one device for several processes.
        """
        place = pick_device(device)
        if place.type == "cuda":
            if place.index not in (None, 0, process.local_rank):
                raise UsageError(
                    f"--device {device}: training uses the first GPU", hint="choose the GPU with CUDA_VISIBLE_DEVICES=N"
                )
            place = torch.device("cuda", process.local_rank)
        stored = checkpoint.tensors[checkpoint.anatomy.embedding].dtype
        computed = pick_dtype(dtype, stored, place)
        if dtype == "auto" and place.type == "cuda" and torch.cuda.is_bf16_supported():
            computed = torch.bfloat16  # float16 overflows in training where bfloat16 does not
        if computed == torch.float64:
            raise UsageError("--dtype float64: not supported in training", hint="--dtype float32")
        is_sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
        if is_sharded and os.environ.get("FSDP_VERSION", "1") != "2":
            raise UsageError("FSDP of version 1 is not supported", hint="set fsdp_version: 2, as in configs/")
        parallelism: Parallelism = "FSDP2" if is_sharded else "DDP" if process.world > 1 else "one process"
        return cls(place, computed, parallelism, not torch.distributed.is_initialized())

    @property
    def name(self) -> str:
        """The precision, by its name."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def is_sharded(self) -> bool:
        """Whether every process holds a part of the model only."""
        return self.parallelism == "FSDP2"

    def meet(self, process: Process) -> None:
        """Wait until every process that trains together is here."""
        if process.world > 1:
            from accelerate import PartialState

            PartialState(cpu=self.device.type == "cpu").wait_for_everyone()

    def part(self, process: Process) -> None:
        """End what the processes have in common: from here on each goes its own way."""
        if process.world > 1:
            self.meet(process)
            if self.owns_group:
                torch.distributed.destroy_process_group()
            forget_processes()  # another run in these processes starts from scratch

    def load(self, checkpoint: Checkpoint, *, trains_all: bool, in_4bit: bool, options: TrainingOptions) -> Any:
        """The whole model, ready to be trained: in float32 where its own weights are, else in what is computed in."""
        weights: DType = "float32" if trains_all or self.device.type == "cpu" else self.name  # type: ignore[assignment]
        if in_4bit:
            return self._load_in_4bit(checkpoint, options.trust_remote_code)
        where = "cpu" if self.is_sharded or self.device.type == "cpu" else str(self.device)
        model, _, _ = load_model(checkpoint, dtype=weights, device=where, trust_remote_code=options.trust_remote_code)
        return model

    def _load_in_4bit(self, checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
        """NF4 with double quantization (QLoRA, Dettmers et al. 2023), through bitsandbytes."""
        from peft import prepare_model_for_kbit_training
        from transformers import BitsAndBytesConfig

        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=self.dtype,
        )
        try:
            model, info = from_directory(
                checkpoint.directory,
                dtype=self.dtype,
                trust_remote_code=trust_remote_code,
                quantization_config=config,
                device_map={"": self.device},
            )
        except (ValueError, RuntimeError, OSError, ImportError) as error:
            raise ShortstackError(f"{checkpoint.source}: cannot be loaded in 4 bit: {first_line(error)}") from None
        refuse_missing(checkpoint, info)
        return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)

    def arguments(
        self, hyperparameters: Hyperparameters, options: TrainingOptions, steps: int, sharding: Sharding, folder: Path
    ) -> TrainingArguments:
        """What the Trainer is told."""
        from transformers import TrainingArguments

        checkpointing = options.gradient_checkpointing
        if checkpointing is None:
            checkpointing = self.device.type == "cuda" and hyperparameters.lora is None
        arguments = TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=sharding.micro_batch,
            gradient_accumulation_steps=sharding.accumulation,
            max_steps=steps,
            learning_rate=hyperparameters.learning_rate,
            lr_scheduler_type=hyperparameters.schedule,
            warmup_steps=hyperparameters.warmup_steps,
            optim="adamw_torch",
            adam_beta1=hyperparameters.betas[0],
            adam_beta2=hyperparameters.betas[1],
            weight_decay=hyperparameters.weight_decay,
            max_grad_norm=1.0,
            bf16=self.dtype == torch.bfloat16,
            fp16=self.dtype == torch.float16,
            use_cpu=self.device.type == "cpu",
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
            seed=options.seed,
            report_to=check_trackers(options.report_to) or "none",
            run_name=f"shortstack-{hyperparameters.method}",
            logging_strategy="no",
            eval_strategy="no",
            save_strategy="no",
            logging_nan_inf_filter=False,
            ignore_data_skip=True,  # the loader begins where the run resumes
            remove_unused_columns=False,
            ddp_find_unused_parameters=False,
            ddp_backend="gloo" if self.device.type == "cpu" and sharding.world > 1 else None,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            log_level="error",
            log_level_replica="error",
        )
        if self.is_sharded and self.device.type == "cpu":
            _ = arguments.device  # sets up the process group and the state that is changed here
            shard_on_cpu()
        return arguments

    def peak_flops(self, process: Process) -> float:
        """What all devices together reach in matrix products in this precision; processes on a CPU share it."""
        return matmul_flops(self.device, self.dtype) * (process.world if self.device.type == "cuda" else 1)

    def release(self) -> None:
        """Give back what a model that is no longer there took."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def check_trackers(report_to: str | None) -> list[str]:
    """The requested trackers, as the Trainer knows them.

    Raises:
        UsageError: one is unknown or not installed.
    """
    names = [name.strip() for name in (report_to or "").split(",") if name.strip() not in ("", "none")]
    for name in names:
        if name not in _TRACKERS:
            raise UsageError(f"--report-to {name}: unknown", hint=did_you_mean(name, _TRACKERS))
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"--report-to {name}: the package is not installed", hint=f"pip install {name}")
    return names


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second that the device reaches in one large matrix product, the best of a few. Half a second."""
    size = 4096 if device.type == "cuda" else 1024
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        started = now(device)
        _ = a @ a
        best = min(best, now(device) - started)
    return 2 * size**3 / best
