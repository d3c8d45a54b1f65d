"""A run that trains block after block: the dense model's states and the pruned one's go through the blocks side by side.

In memory are, beside the states and what lies outside the blocks, at most three blocks of one of the two models, or one
block with its gradients and its optimizer. A finished block is a file in the work folder; states are computed again when a
killed run resumes, which gives the same ones.

Legend: B rows, T tokens, D hidden size, N real tokens.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from shortstack.artifacts.training import STATES
from shortstack.checkpoint.byte_copy import TensorCopy, same_bytes
from shortstack.checkpoint.drop_blocks import cut_blocks
from shortstack.checkpoint.headers import TensorInfo, read_header
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.formatting import ranges, size
from shortstack.common.phases import phase
from shortstack.data.collators import Batch
from shortstack.engine.batch_states import BatchModel, BatchStates
from shortstack.engine.block_model import NotSeparableError
from shortstack.engine.cpu import computing
from shortstack.errors import ShortstackError, UsageError, first_line
from shortstack.publishing.model_card import write_beside_weights
from shortstack.retraining.local_blocks import BlockTraining, near_cuts, target_depths
from shortstack.retraining.local_healing import Healing, Streams
from shortstack.retraining.results import Measure, RetrainEstimate
from shortstack.retraining.run import Run
from shortstack.retraining.run_folder import Monitor, step_of
from shortstack.retraining.validation import streamed_nll
from shortstack.runtime.memory import available_bytes

_DEFAULT_TOKENS = 1_000_000
_STATES_SHARE = 0.5  # of the free memory: what hidden states may take before they lie on disk
_VALIDATED_SHARE = 10  # for this many training batches, one validates each block
_GIVEN = ("input_ids", "attention_mask", "position_ids")


@dataclass
class LocalRun(Run):
    """A run over blocks.

    Attributes:
        dense: the model that was pruned.
        states: where hidden states lie.
    """

    dense: Checkpoint
    states: str
    unit: ClassVar[str] = STATES
    replaced: dict[str, TensorInfo] = field(default_factory=dict, init=False)

    # ---- what it is made of

    @property
    def kept(self) -> list[int]:
        """Where the blocks of the pruned model stand in the dense one."""
        return [self.dense.position_of(block) for block in self.checkpoint.original_blocks]

    @property
    def settings(self) -> dict[str, Any]:
        """Which blocks are trained, and what is compared."""
        return self.hyperparameters.local or {}

    @property
    def inputs(self) -> list[Path]:
        """Directories that the output may not touch."""
        return [self.checkpoint.directory, self.dense.directory]

    @property
    def tokens(self) -> int:
        """Tokens of the text, which every block is trained on."""
        return self.feed.tokens(self.pass_steps, self.hyperparameters.batch)

    @property
    def kept_step(self) -> int:
        """The last one: every block that became worse was left as it was."""
        return self.steps

    def _count_steps(self) -> tuple[int, int]:
        if self.place.is_sharded:
            raise UsageError(
                "FSDP: has no effect on blocks that are trained one at a time", hint="use torchrun without FSDP"
            )
        hyperparameters, held = self.hyperparameters, self.feed.tokens_per_epoch
        requested = hyperparameters.tokens
        if requested is not None and held is not None and requested > held:
            raise ShortstackError(
                f"--tokens {requested}: {self.feed.described.get('source')} holds {held} tokens to train on",
                hint=f"--tokens {held}, or more text; --epochs N trains every block on the same text N times",
            )
        tokens = requested or min(_DEFAULT_TOKENS, held or _DEFAULT_TOKENS)
        self.pass_steps = self.feed.steps(hyperparameters.batch, epochs=None, tokens=tokens)
        self.block_steps = math.ceil(self.pass_steps * (hyperparameters.epochs or 1))
        self.shared = self._shared_blocks()
        radius = self.settings["radius"]
        near = near_cuts(self.kept, self.dense.depth, None if radius == "all" else radius)
        self.chosen = [position for position in near if position >= self.shared]
        self.progress.say(
            f"{len(self.chosen)} of {self.checkpoint.depth} blocks are trained "
            f"({ranges([self.checkpoint.original_blocks[at] for at in self.chosen])}), {self.block_steps} steps each"
        )
        return self.block_steps * len(self.chosen), self.block_steps

    def _shared_blocks(self) -> int:
        """How many of the first blocks give to the bit what the dense model's give: there is nothing to heal in them."""
        pairs = [(self.checkpoint.outside_blocks, self.dense.outside_blocks)]
        pairs += zip(self.checkpoint.blocks, self.dense.blocks, strict=False)
        goals = target_depths(self.kept, self.dense.depth)
        for count, (ours, theirs) in enumerate(pairs):
            meets = count == 0 or goals[count - 1] == count
            if not meets or len(ours) != len(theirs) or not all(map(_same, ours, theirs)):
                return max(0, count - 1)
        return self.checkpoint.depth

    def _flops_per_token(self) -> float:
        """Two for each weight forwards, and two or four backwards."""
        return (4 if self.settings["lora_rank"] else 6) * max(self.checkpoint.block_parameters())

    @property
    def measure(self) -> Measure:
        """How the models of the table at the end are measured: they, too, block by block."""

        def figures(checkpoint: Checkpoint) -> dict[str, float]:
            with computing(self.place.dtype, self.place.device), self._opened(checkpoint) as (model,):
                return self.held_out.figures(lambda batches: streamed_nll(model, batches, self._file("measured")))

        return figures

    # ---- the work

    def train(self) -> None:
        """Train, or resume, until the last block is done."""
        done = step_of(self.resumed) if self.resumed is not None else 0
        self.monitor = Monitor(
            self.progress,
            self.steps,
            self._flops_per_token(),
            self.place.peak_flops(self.process) if self.process.leads else 0,
        )
        with (
            computing(self.place.dtype, self.place.device),
            self._opened(self.dense, self.checkpoint) as (dense, pruned),
            self._streams(dense, pruned) as streams,
            phase("training"),
        ):
            goals, last = target_depths(self.kept, self.dense.depth), max(self.chosen)
            if self.shared:
                dense.advance(streams.batches, streams.theirs, range(self.shared))
                streams.ours.copy_from(streams.theirs)
                streams.depth = self.shared
            for position in range(self.shared, last + 1):
                if streams.before is not None:
                    streams.before.copy_from(streams.theirs)
                dense.advance(streams.batches, streams.theirs, range(streams.depth, goals[position]))
                streams.depth = goals[position]
                if position in self.chosen:
                    self._heal(pruned, position, streams, done)
                if position < last:
                    pruned.advance(streams.batches, streams.ours, [position])
        self.place.part(self.process)

    @contextlib.contextmanager
    def _opened(self, *checkpoints: Checkpoint) -> Iterator[tuple[BatchModel, ...]]:
        """Within, models whose blocks come in one at a time; the later ones borrow what they share with the first."""
        with contextlib.ExitStack() as stack:
            models: list[BatchModel] = []
            for checkpoint in checkpoints:
                try:
                    model = BatchModel(
                        checkpoint,
                        dtype=self.place.dtype,
                        device=self.place.device,
                        trust_remote_code=self.options.trust_remote_code,
                        like=models[0] if models else None,
                    )
                except NotSeparableError as error:
                    raise ShortstackError(
                        f"{checkpoint.source}: its blocks cannot be trained one at a time: {error.reason}",
                        hint="retrain distill --hidden-weight 1 trains them together",
                    ) from None
                stack.callback(model.close)
                models.append(model)
            yield tuple(models)

    @contextlib.contextmanager
    def _streams(self, dense: BatchModel, pruned: BatchModel) -> Iterator[Streams]:
        """Within, the states of all batches before the first block."""
        loader = self.feed.loader(self.shares, 0, self.pass_steps, {}, 0)
        found = list(itertools.islice(loader, self.pass_steps * self.shares.accumulation))
        for error in (batch["error"] for batch in found if "error" in batch):
            raise error
        batches = [{name: batch[name] for name in _GIVEN if name in batch} for batch in (*found, *self._validation())]
        self._choose_place(self._states_bytes(sum(batch["input_ids"].numel() for batch in batches)))
        count = 3 if self.settings["update_weight"] else 2
        made: list[BatchStates] = []
        try:
            for model, name in zip((pruned, dense, dense)[:count], ("ours", "theirs", "before"), strict=False):
                made.append(model.embedded(batches, self._file(name)))
            ours, theirs, *before = made
            yield Streams(batches, len(found), ours, theirs, before[0] if before else None)
        finally:
            for states in made:
                states.close()
            shutil.rmtree(self.session.folder / "states", ignore_errors=True)

    def _file(self, name: str) -> Path | None:
        """Where states lie, if not in memory: every process has its own."""
        if self.states != "disk" or self.options.dry_run:
            return None
        return self.session.folder / "states" / f"{name}-{self.process.rank}.bin"

    def _validation(self) -> list[Batch]:
        """The batches that this process validates a block on: not many more than a tenth of what it trains on."""
        few = max(1, self.pass_steps * self.shares.accumulation * self.process.world // _VALIDATED_SHARE)
        return self.feed.held_out[:few][self.process.rank :: self.process.world]

    def _states_bytes(self, tokens: int) -> int:
        """Bytes of the states of so many tokens."""
        width = self.checkpoint.tensors[self.checkpoint.anatomy.embedding].shape[1]
        count = 3 if self.settings["update_weight"] else 2
        return count * tokens * width * self.place.dtype.itemsize

    def _choose_place(self, needed: int) -> None:
        """Memory or disk, where that is left open; too little room is an error before anything is computed."""
        if self.states == "auto":
            self.states = "disk" if needed > _STATES_SHARE * available_bytes() else "memory"
            if self.states == "disk":
                self.progress.say(f"hidden states take {size(needed)}: they lie on disk, beside {self.out}")
        free = self._free_disk() if self.states == "disk" else available_bytes()
        if needed > free:
            where = f"on the disk of {self.out}" if self.states == "disk" else "in memory"
            raise ShortstackError(
                f"hidden states take {size(needed)}, {size(free)} are free {where}",
                hint="fewer --tokens" + ("" if self.states == "disk" else ", or --states disk"),
            )

    def _free_disk(self) -> int:
        folder = next(one for one in self.session.folder.parents if one.exists())
        return shutil.disk_usage(folder).free

    # ---- one block

    def _heal(self, pruned: BatchModel, position: int, streams: Streams, done: int) -> None:
        """Train one block, unless an earlier run did; from here on its weights are those of the file that this leaves."""
        first = self.chosen.index(position) * self.block_steps
        file = self.session.folder / "blocks" / f"block-{self.checkpoint.original_blocks[position]:05d}.safetensors"
        if done < first + self.block_steps:
            for _, block in pruned.weights.each([position]):
                Healing(self, pruned, streams, position, self._training(block, position), file).train(
                    first, max(0, done - first)
                )
            self.place.meet(self.process)  # the first process has written the file
        try:
            tensors, _ = read_header(file)
        except (OSError, ShortstackError) as error:
            raise ShortstackError(
                f"{file}: a block that was trained before cannot be read ({first_line(error)})",
                hint="--restart starts again from step 0",
            ) from None
        self.replaced |= {tensor.name: tensor for tensor in tensors}
        pruned.weights.read_instead(position, tensors)

    def _training(self, block: torch.nn.Module, position: int) -> BlockTraining:
        generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + position)
        return BlockTraining(block, self.hyperparameters, self.block_steps, generator)

    # ---- the result

    def write(self, stage: Path, step: dict[str, Any]) -> None:
        """Every tensor to the byte as it was, or as it was trained."""
        from shortstack.pruning.prune import copy_weights

        checkpoint = self.checkpoint
        cut = cut_blocks(checkpoint, range(checkpoint.depth))
        tensors = tuple(replace(copy, source=self.replaced.get(copy.source.name, copy.source)) for copy in cut.tensors)
        files = copy_weights(checkpoint, replace(cut, tensors=tensors), stage, False, self.progress)
        step = {**step, "trained_blocks": [checkpoint.original_blocks[at] for at in self.chosen]}
        write_beside_weights(checkpoint, stage, config=cut.config, step=step, files=files, progress=self.progress)

    def estimate(self) -> RetrainEstimate:
        """What the run would be, from three measured steps of one block and the way of one batch through another.

        The states that it is measured on are those that go into the first block: what they are changes no time.
        """
        from shortstack.retraining.estimate import beside_the_steps

        validated = sum(batch["input_ids"].numel() for batch in self._validation())
        needed = self._states_bytes(self.tokens // self.process.world + validated)
        self._choose_place(needed)
        passes, self.pass_steps = self.pass_steps, 1  # no more is read, and run
        with (
            computing(self.place.dtype, self.place.device),
            self._opened(self.dense, self.checkpoint) as (dense, pruned),
            self._streams(dense, pruned) as streams,
        ):
            position = self.chosen[0]
            for _, block in pruned.weights.each([position]):
                training = self._training(block, position)
                healing = Healing(self, pruned, streams, position, training, self.out)
                trained = sum(leaf.numel() for leaf in training.leaves.values())
                stepping = _seconds(healing.try_step)
            passing = _seconds(lambda: dense.advance(streams.batches, streams.theirs, [0]))
        self.pass_steps = passes
        blocks = self.dense.depth + self.checkpoint.depth
        return RetrainEstimate(
            method=self.hyperparameters.method,
            trained=trained * len(self.chosen),
            parameters=self.checkpoint.parameters(),
            steps=self.steps,
            tokens=self.tokens,
            data=self.feed.described,
            bytes_per_device=self._memory(trained, needed),
            seconds_per_step=stepping + passing * blocks * passes / self.steps,
            processes=self.process.world,
            notes=[
                f"{len(self.chosen)} of {self.checkpoint.depth} blocks, {self.block_steps} steps each",
                f"hidden states take {size(needed)} {'on disk' if self.states == 'disk' else 'of memory'}",
                *beside_the_steps(self.checkpoint, self.out, trained, force=self.options.force),
            ],
        )

    def _memory(self, trained: int, states: int) -> dict[str, int]:
        """Bytes by what they are for; at most, as a block that comes in and one that is trained are never there together."""
        item = self.place.dtype.itemsize
        outside = self.checkpoint.parameters(self.checkpoint.outside_blocks) * item
        return {
            "outside blocks": outside,
            "blocks": 3 * max(self.dense.block_parameters()) * item,
            "gradients": 4 * trained,
            "optimizer": 8 * trained,
            **({} if self.states == "disk" else {"hidden states": states}),
        }


def _seconds(work: Callable[[], object]) -> float:
    """What it takes: the median of three, of which the first one allocates."""
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return sorted(taken)[1]


def _same(ours: TensorInfo, theirs: TensorInfo) -> bool:
    shaped = (ours.name, ours.dtype, ours.shape) == (theirs.name, theirs.dtype, theirs.shape)
    return shaped and same_bytes(TensorCopy(ours, ours.name), TensorCopy(theirs, theirs.name))
