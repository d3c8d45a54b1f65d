"""The steps of one block that is trained towards the dense model's states, from the first one or from a saved one.

Legend: B rows, T tokens, D hidden size.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from shortstack.checkpoint.byte_copy import first_nonfinite
from shortstack.checkpoint.headers import read_header, write_header
from shortstack.data.collators import real_tokens
from shortstack.engine.storage import bytes_of
from shortstack.errors import ShortstackError
from shortstack.retraining.batch_states import BatchModel
from shortstack.retraining.export import DTYPES
from shortstack.retraining.local_blocks import BlockTraining, StateLoss
from shortstack.retraining.losses import NonFiniteLossError
from shortstack.runtime.atomic_output import write_file
from shortstack.runtime.devices import exact_place

if TYPE_CHECKING:
    from shortstack.retraining.local_schedule import LocalRun
    from shortstack.retraining.local_streams import Streams
    from shortstack.retraining.run_folder import Monitor

TRAINED, OPTIMIZER = "trained.safetensors", "optimizer.safetensors"


@dataclass
class Healing:
    """One block while it is trained.

    Attributes:
        run: what it belongs to.
        monitor: reports how it goes.
        model: the pruned model; the block's weights are in.
        streams: what goes into the block, and what it should give.
        position: the block's, in the pruned model.
        training: what is trained of it.
        file: where the block is written when it is done.
        tokens: of the last step, over all processes.
    """

    run: LocalRun
    monitor: Monitor
    model: BatchModel
    streams: Streams
    position: int
    training: BlockTraining
    file: Path
    tokens: int = 0

    @property
    def block(self) -> int:
        """Its number in the original model."""
        return self.run.checkpoint.original_blocks[self.position]

    def train(self, first: int, begun: int) -> None:
        """Take its steps, log them, save its state, and write its file.

        Args:
            first: steps of the blocks before it.
            begun: its own steps that an earlier run did.
        """
        run = self.run
        before = self._validated()
        if begun:
            self._restore(begun)
        losses: list[dict[str, float]] = []
        for step in range(begun, run.schedule.block_steps):
            done, is_last = first + step + 1, step + 1 == run.schedule.block_steps
            found = self.gradients(step)
            if not math.isfinite(found["loss"]):
                raise NonFiniteLossError(done, found["loss"], run.session.complete_steps())
            norm = self.training.update(step)
            self.monitor.step_done(done, self.tokens)
            losses.append(found)
            saves = is_last or done % run.options.save_every == 0
            validated = self._finish(before) if is_last else {}
            if saves or done % run.options.log_every == 0 or step == 0:
                means = {name: math.fsum(one[name] for one in losses) / len(losses) for name in found}
                self._log(
                    step, done, {**means, "grad_norm": norm, "learning_rate": self.training.rate(step), **validated}
                )
                losses = []
            if saves:
                self._save(done, step, is_last)

    def _log(self, step: int, done: int, figures: dict[str, float]) -> None:
        run = self.run
        record = {"step": done, "block": self.block, **figures, **self.monitor.figures()}
        record["tokens"] = run.dataset.tokens(
            min(step + 1, run.schedule.pass_steps), run.hyperparameters.batch
        )  # of the text
        run.session.log(record)
        if run.process.leads:
            self.monitor.say(record)

    def gradients(self, step: int) -> dict[str, float]:
        """Those of a step, over all processes, and the means of its losses over real tokens."""
        process, sums = self.run.process, dict[str, torch.Tensor]()
        numbers = self._step_batches(step)
        tokens = sum(real_tokens(self.streams.batches[number]) for number in numbers)
        total = float(process.summed(torch.tensor(float(tokens), dtype=torch.float64)))
        for number in numbers:
            with torch.enable_grad():
                parts = self._losses(number)
                (parts["loss"] / total).backward()  # type: ignore[no-untyped-call]
            for name, value in parts.items():
                sums[name] = (
                    sums.get(name, torch.zeros((), dtype=torch.float64)) + exact_place(value.detach()).double().cpu()
                )
        if process.world > 1:
            for leaf in self.training.leaves.values():
                if leaf.grad is not None:
                    leaf.grad.copy_(process.summed(leaf.grad))
        self.tokens = int(total)
        return {name: float(process.summed(value)) / total for name, value in sums.items()}

    def try_step(self) -> None:
        """A first step that leads to nothing: to measure what one takes."""
        self.gradients(0)
        self.training.update(0)

    def _step_batches(self, step: int) -> list[int]:
        """Numbers of this process's micro-batches of a step; every pass has an order of its own."""
        turn, place = divmod(step, self.run.schedule.pass_steps)
        seed = (self.run.options.seed * 1_000_003 + self.position) * 1_009 + turn
        order = torch.randperm(self.run.schedule.pass_steps, generator=torch.Generator().manual_seed(seed)).tolist()
        each = self.run.sharding.accumulation
        return list(range(order[place] * each, (order[place] + 1) * each))

    def _losses(self, number: int) -> dict[str, torch.Tensor]:
        """Sums of the losses of one batch."""
        streams, device, settings = self.streams, self.model.skeleton.device, self.run.schedule.settings
        batch = streams.batches[number]
        hidden_BTD, call = streams.ours[number].to(device), self.model.call(batch, self.position)
        given_BTD = self.training.states(self.model.skeleton, hidden_BTD, call)
        mask_BT = batch.get("attention_mask")
        chosen_BT = torch.ones_like(batch["input_ids"]) if mask_BT is None else mask_BT
        chosen_BT = chosen_BT.bool().to(device)
        before = None if streams.before is None else streams.before[number].to(device)[chosen_BT]
        loss = StateLoss(settings["update_weight"], settings["cosine_weight"])
        return loss(given_BTD[chosen_BT], streams.theirs[number].to(device)[chosen_BT], before)

    @torch.no_grad()
    def _validated(self) -> float | None:
        """The mean loss on the validation batches, over all processes; None where there are none."""
        summed = torch.zeros(2, dtype=torch.float64)
        for number in self.streams.validation:
            loss = self._losses(number)["loss"]
            summed += torch.tensor([float(loss), float(real_tokens(self.streams.batches[number]))], dtype=torch.float64)
        loss_sum, tokens = self.run.process.summed(summed).tolist()
        return loss_sum / tokens if tokens else None

    def _finish(self, before: float | None) -> dict[str, float]:
        """Write the block's file, without a tensor where training made it worse; gives what was validated."""
        after = self._validated()
        improved = before is None or after is None or after < before
        if not improved:
            self.run.progress.say(
                f"block {self.block}: training did not bring it nearer to the dense model (validation {before:.4g}, then "
                f"{after:.4g}): it is left unchanged"
            )
        if self.run.process.leads:
            self._write(self.training.weights() if improved else {})
        return {} if before is None or after is None else {"validation": after, "validation_before": before}

    def _write(self, weights: dict[str, torch.Tensor]) -> None:
        block, skeleton = self.run.checkpoint.blocks[self.position], self.model.skeleton
        named = {f"{skeleton.blocks_name}.{self.position}.{name}": value.detach() for name, value in weights.items()}
        stored = skeleton.conversion.stored(block, named)
        tensors = [replace(tensor, file=self.file) for tensor in block if tensor.name in stored]
        values = [stored[tensor.name].to("cpu", DTYPES[tensor.dtype]).contiguous() for tensor in tensors]
        write_file(self.file, write_header(tensors, {}), *map(bytes_of, values))
        broken = first_nonfinite(read_header(self.file)[0])
        if broken is not None:
            raise ShortstackError(
                f"block {self.block}: {broken} is not finite once it is stored as it was, in "
                f"{self.run.checkpoint.tensors[broken].dtype}",
                hint="use a lower --lr, and --restart",
            )

    def _save(self, done: int, step: int, is_last: bool) -> None:
        """The state after a step; after the last one the block's file is all that is needed."""
        run, started = self.run, time.perf_counter()
        if run.process.leads:
            with run.session.saving(done) as folder:
                folder.mkdir(parents=True, exist_ok=True)
                trained, known = ({}, {}) if is_last else self.training.saved()
                save_file(trained, folder / TRAINED, {"block": str(self.block), "steps": str(step + 1)})
                save_file(known, folder / OPTIMIZER)
                run.session.complete(folder)
                run.session.rotate(None)
        run.place.meet(run.process)
        self.monitor.pause(started)

    def _restore(self, begun: int) -> None:
        folder = self.run.resumed
        if folder is None:
            return
        _, saved = read_header(folder / TRAINED)
        if saved != {"block": str(self.block), "steps": str(begun)}:  # resumed with other settings, by --force
            raise ShortstackError(
                f"{folder}: is of step {saved.get('steps')} of block {saved.get('block')}, and the run is at step {begun} of "
                f"block {self.block}: other blocks or other steps cannot resume from it",
                hint="--restart starts again from step 0",
            )
        known = folder / OPTIMIZER
        with_optimizer = load_file(known) if known.is_file() else {}  # --weights-only-resume begins without
        self.training.restore(load_file(folder / TRAINED), with_optimizer)
