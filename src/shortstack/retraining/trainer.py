"""The loop: transformers' Trainer, with our own batches, sums of losses, complete checkpoints and stops.

What is changed and why: batches come from an order that the number of processes does not change (the Trainer's depends on
it); losses are sums over predicted tokens divided by their number over all processes; a checkpoint holds the trained
parameters by name, and counts when it is complete; a loss that is not finite ends the run.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from shortstack.common.json_text import json_text, read_json
from shortstack.common.phases import phase
from shortstack.data.collators import Batch, predicted_tokens, real_tokens
from shortstack.errors import ShortstackError
from shortstack.retraining.losses import NonFiniteLossError, Objective
from shortstack.retraining.run_folder import STREAM, Monitor, Session
from shortstack.runtime.devices import exact_place
from shortstack.runtime.private_names import check_trainer, check_trainer_class, state_file_names

TRAINED = "trained.safetensors"
_BEST = "best.json"


@dataclass(frozen=True)
class Watch:
    """What is looked at while a model is trained, and how often.

    Attributes:
        monitor: writes the lines of progress.
        measure: model -> figures on the validation set and the evaluation texts.
        keep_best: the saved step with the lowest validation loss is the result; else the last one.
        log_every, eval_every, save_every: steps between two lines, two measurements, two checkpoints.
    """

    monitor: Monitor
    measure: Callable[[Any], dict[str, float]]
    keep_best: bool
    log_every: int
    eval_every: int
    save_every: int


class RetrainTrainer(Trainer):  # type: ignore[misc]
    """The Trainer, on our batches and objective.

    Args:
        objective: the loss.
        loader: this process's micro-batches, beginning with the step after `resumed`.
        session: the work folder.
        monitor: says how it goes.
        measure: figures on the validation set, by name; run by every process.
        keep_best: remember the saved step with the lowest validation loss.
        rhythm: steps between two lines of progress, two evaluations and two saved checkpoints.
        stream: where the data streams stood at the checkpoint that the run resumes from.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        objective: Objective,
        loader: Iterable[Batch],
        stream: dict[str, Any],
        session: Session,
        watch: Watch,
    ) -> None:
        check_trainer_class(Trainer)
        self.session, self.monitor = session, watch.monitor
        self.control: Any
        super().__init__(model, args, callbacks=[_Rhythm(watch), _Guard(self)])
        check_trainer(self)
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.model_accepts_loss_kwargs = True  # losses come divided by the number of predicted tokens
        self._objective, self._batches, self._measure = objective, loader, watch.measure
        self._keep_best = watch.keep_best
        self._stream = dict(stream)
        self._parts: dict[str, torch.Tensor] = {}
        self._tokens = 0
        self.best: dict[str, Any] = {}

    def get_train_dataloader(self) -> Any:
        """Our own, which this process alone reads: nothing is left for accelerate to divide."""
        return self._batches

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor]:
        """The micro-batches of one step, and how many tokens they predict over all processes."""
        batches = list(itertools.islice(epoch_iterator, num_batches))  # none, where all steps were done before
        for batch in batches:
            self._stream |= batch.pop("stream", {})
        counts = torch.tensor([sum(map(predicted_tokens, batches)), sum(map(real_tokens, batches))], device=device)
        predicted, self._tokens = map(int, self._summed(counts).tolist())
        return batches, torch.tensor(predicted, device=device)

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The sum of losses over all predicted tokens of the step's global batch, divided by their number."""
        sums = self._objective(model, inputs)
        # Gradients are averaged over processes; the sum over all of them is wanted.
        scale = self.accelerator.num_processes / num_items_in_batch
        exact_scale = exact_place(scale) if torch.is_tensor(scale) else scale
        for name, value in sums.items():
            self._parts[name] = self._parts.get(name, 0) + exact_place(value.detach()).double() * exact_scale
        loss: torch.Tensor = sums["loss"] * scale
        return loss

    def step_losses(self) -> dict[str, float]:
        """The losses of the step that has just been computed, over all processes, and forget them."""
        names = list(self._parts)
        values = self._summed(torch.stack([self._parts[name].double() for name in names]))
        self._parts = {}
        return dict(zip(names, (values / self.accelerator.num_processes).tolist(), strict=True))

    def _summed(self, values: torch.Tensor) -> torch.Tensor:
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(values)
        return values

    # ---- what is said

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A line of metrics, a line on stderr, and what the trackers get."""
        if "loss" not in logs and not any(name == "validation" or name.startswith("ppl:") for name in logs):
            return  # what the Trainer says at its end
        record: dict[str, Any] = {"step": self.state.global_step}
        if "loss" in logs:
            record |= {**self.guard.mean_losses(), "grad_norm": logs.get("grad_norm")}
            record |= {
                "learning_rate": logs.get("learning_rate"),
                "tokens": self.guard.tokens,
                **self.monitor.figures(),
            }
        else:
            record |= logs
        self.session.log(record)
        if self.is_world_process_zero():
            self.monitor.say(record)
        shown = {name: value for name, value in record.items() if name != "step" and value is not None}
        finite = {
            name: value for name, value in shown.items() if math.isfinite(value)
        }  # the Trainer's file is JSON, too
        self.state.log_history.append({**finite, "step": self.state.global_step})
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, dict(shown))

    @property
    def guard(self) -> _Guard:
        """The callback that keeps the losses between two logging steps."""
        found: _Guard = next(cb for cb in self.callback_handler.callbacks if isinstance(cb, _Guard))
        return found

    @phase("validation")
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure on the validation set."""
        started = time.perf_counter()
        figures = self._measure(self.model_wrapped if self.is_fsdp_enabled else self.model)
        self.monitor.pause(started)
        if figures:
            self.log(dict(figures))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, dict(figures))
        return figures

    # ---- checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        started = time.perf_counter()
        step = self.state.global_step
        folder = self.session.at(step)
        if step in self.session.complete_steps():
            return
        with self.session.saving(step):
            super()._save_checkpoint(model, trial)
            stream = self._gathered_stream()
            if self.is_world_process_zero():
                if stream:
                    (folder / STREAM).write_text(json_text(stream), encoding="utf-8")
                self._note_best(step)
                self.session.complete(folder)
                self.session.rotate(self.best.get("step"))
        self.accelerator.wait_for_everyone()
        self.monitor.pause(started)

    def _gathered_stream(self) -> dict[str, Any]:
        if self.accelerator.num_processes == 1:
            return self._stream
        gathered: list[Any] = [None] * self.accelerator.num_processes
        torch.distributed.all_gather_object(gathered, self._stream)
        return {stream: state for part in gathered for stream, state in part.items()}

    def restore_best(self) -> None:
        """Which saved step was the best so far, and that its checkpoint is still there."""
        path = self.session.folder / _BEST
        if path.is_file():
            best = read_json(path.read_bytes())
            self.best = best if best["step"] in self.session.complete_steps() else {}

    def _note_best(self, step: int) -> None:
        losses = [line for line in self.session.read_metrics() if line["step"] == step and "validation" in line]
        if self._keep_best and losses:
            loss = losses[-1]["validation"]
            if math.isfinite(loss) and loss < self.best.get("validation", math.inf):
                self.best = {"step": step, "validation": loss}
                (self.session.folder / _BEST).write_text(json_text(self.best), encoding="utf-8")

    def trained_parameters(self) -> dict[str, torch.Tensor]:
        """The parameters that are trained, by name, on the CPU; gathered where they are sharded (call on every process)."""
        model = self.accelerator.unwrap_model(self.model)
        found = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
                found[name] = whole.detach().cpu()
        return found

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """What is trained and nothing else: the rest is in the input."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model)
        trained = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
        save_file(trained, folder / TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        put_trained(self.accelerator.unwrap_model(self.model), load_file(Path(resume_from_checkpoint) / TRAINED))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.is_fsdp_enabled or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        # Read on the CPU and put where the parameters are by the optimizer itself: the Trainer's way of reading it right
        # onto the device of each of several processes fails on a CPU.
        for name, receiver in zip(state_file_names(), (self.optimizer, self.lr_scheduler), strict=True):
            path = Path(checkpoint) / name
            if path.is_file():  # the session has looked: only --weights-only-resume resumes without
                receiver.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))


def put_trained(model: Any, trained: dict[str, torch.Tensor]) -> None:
    """Set parameters by name; every one of them must be there, in this shape.

    Raises:
        ShortstackError: they are another model's.
    """
    parameters = dict(model.named_parameters())
    wrong = [name for name, value in trained.items() if name not in parameters or parameters[name].shape != value.shape]
    if wrong:
        raise ShortstackError(f"the checkpoint's {wrong[0]} does not fit the model ({len(wrong)} of {len(trained)})")
    with torch.no_grad():
        for name, value in trained.items():
            parameters[name].copy_(value)


class _Rhythm(TrainerCallback):  # type: ignore[misc]
    """When to log, to evaluate and to save: every so many steps, and at the end. What is saved is evaluated first."""

    def __init__(self, watch: Watch) -> None:
        self._log, self._eval, self._save = watch.log_every, watch.eval_every, watch.save_every

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> Any:
        step, last = state.global_step, state.global_step >= state.max_steps
        control.should_save = last or step % self._save == 0
        control.should_log = control.should_save or step % self._log == 0 or step == 1
        control.should_evaluate = control.should_save or step % self._eval == 0
        return control


class _Guard(TrainerCallback):  # type: ignore[misc]
    """Looks at every step's loss before the weights change, and keeps the losses for the next line."""

    def __init__(self, trainer: RetrainTrainer) -> None:
        self._trainer = trainer
        self._losses: list[dict[str, float]] = []
        self.tokens = 0

    def on_pre_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        losses = self._trainer.step_losses()
        if not math.isfinite(losses["loss"]):
            saved_steps = self._trainer.session.complete_steps()
            raise NonFiniteLossError(state.global_step + 1, losses["loss"], saved_steps)
        self._losses.append(losses)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        self.tokens += self._trainer._tokens
        self._trainer.monitor.step_done(state.global_step, self._trainer._tokens)

    def mean_losses(self) -> dict[str, float]:
        """Means since the last call."""
        losses, self._losses = self._losses, []
        return {name: math.fsum(step[name] for step in losses) / len(losses) for name in losses[0]} if losses else {}
