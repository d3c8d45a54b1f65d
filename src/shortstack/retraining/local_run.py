"""A run that trains block after block: the dense model's states and the pruned one's go through the blocks side by side.

In memory are, beside the states and what lies outside the blocks, at most three blocks of one of the two models, or one
block with its gradients and its optimizer. A finished block is a file in the work folder; states are computed again when a
killed run resumes, which gives the same ones.

Legend: B rows, T tokens, D hidden size, N real tokens.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from shortstack.artifacts.training import STATES
from shortstack.checkpoint.drop_blocks import cut_blocks
from shortstack.checkpoint.headers import TensorInfo, read_header
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.formatting import size
from shortstack.common.phases import phase
from shortstack.engine.cpu import computing
from shortstack.errors import ShortstackError, first_line
from shortstack.publishing.model_card import write_beside_weights
from shortstack.retraining.batch_states import BatchModel
from shortstack.retraining.local_blocks import BlockTraining, target_depths
from shortstack.retraining.local_healing import Healing
from shortstack.retraining.local_schedule import BlockSchedule, LocalRun, States, block_schedule
from shortstack.retraining.local_streams import (
    Streams,
    Where,
    chosen_place,
    opened,
    states_file,
    states_nbytes,
    streams_of,
    validation_batches,
)
from shortstack.retraining.results import RetrainEstimate
from shortstack.retraining.run import Trained, Way
from shortstack.retraining.run_folder import Monitor, step_of
from shortstack.retraining.validation import streamed_nll


@dataclass(frozen=True)
class TrainedBlocks(Trained):
    """What training blocks gave.

    Attributes:
        tensors: by name, those of the blocks that became better.
        states: where hidden states lay meanwhile.
    """

    tensors: dict[str, TensorInfo] = field(repr=False)
    states: Where


def block_by_block(dense: Checkpoint, states: States) -> Way[BlockSchedule, TrainedBlocks]:
    """Train one block after the other towards the dense model's hidden states.

    Args:
        dense: the model that was pruned.
        states: where hidden states lie.
    """
    return Way(
        schedule=functools.partial(block_schedule, dense=dense, states=states),
        train=train,
        estimate=estimate,
        write=write,
        measure=measure,
        inputs=(dense.directory,),
        unit=STATES,
    )


def train(run: LocalRun) -> TrainedBlocks:
    """Train, or resume, until the last block is done."""
    schedule, place, process = run.schedule, run.place, run.process
    done = step_of(run.resumed) if run.resumed is not None else 0
    peak_flops = place.peak_flops(process) if process.leads else 0
    monitor = Monitor(run.progress, schedule.steps, _flops_per_token(run), peak_flops)
    healed: dict[str, TensorInfo] = {}
    with (
        computing(place.dtype, place.device),
        opened(run, schedule.dense, run.checkpoint) as (dense, pruned),
        streams_of(run, dense, pruned) as streams,
        phase("training"),
    ):
        goals, last = target_depths(schedule.kept, schedule.dense.depth), max(schedule.chosen)
        if schedule.shared:
            dense.advance(streams.batches, streams.theirs, range(schedule.shared))
            streams.ours.copy_from(streams.theirs)
            streams.depth = schedule.shared
        for position in range(schedule.shared, last + 1):
            if streams.before is not None:
                streams.before.copy_from(streams.theirs)
            dense.advance(streams.batches, streams.theirs, range(streams.depth, goals[position]))
            streams.depth = goals[position]
            if position in schedule.chosen:
                tensors = _heal(run, pruned, position, streams, monitor, done)
                healed |= {tensor.name: tensor for tensor in tensors}
                pruned.weights.read_instead(position, tensors)
            if position < last:
                pruned.advance(streams.batches, streams.ours, [position])
    place.part(process)
    # The last step is kept: every block that became worse was left as it was.
    return TrainedBlocks(_tokens(run), schedule.steps, healed, streams.where)


def _tokens(run: LocalRun) -> int:
    """Tokens of the text, which every block is trained on."""
    return run.dataset.tokens(run.schedule.pass_steps, run.hyperparameters.batch)


def _flops_per_token(run: LocalRun) -> float:
    """Two for each weight forwards, and two or four backwards."""
    return (4 if run.schedule.settings["lora_rank"] else 6) * max(run.checkpoint.block_parameters())


def _heal(
    run: LocalRun, pruned: BatchModel, position: int, streams: Streams, monitor: Monitor, done: int
) -> Sequence[TensorInfo]:
    """Train one block, unless an earlier run did; its tensors in the file that this leaves."""
    steps = run.schedule.block_steps
    first = run.schedule.chosen.index(position) * steps
    file = run.session.folder / "blocks" / f"block-{run.checkpoint.original_blocks[position]:05d}.safetensors"
    if done < first + steps:
        for _, block in pruned.weights.each([position]):
            training = _training(run, block, position)
            Healing(run, monitor, pruned, streams, position, training, file).train(first, max(0, done - first))
        run.place.meet(run.process)  # the first process has written the file
    try:
        tensors, _ = read_header(file)
    except (OSError, ShortstackError) as error:
        raise ShortstackError(
            f"{file}: a block that was trained before cannot be read ({first_line(error)})",
            hint="--restart starts again from step 0",
        ) from None
    return tensors


def _training(run: LocalRun, block: torch.nn.Module, position: int) -> BlockTraining:
    generator = torch.Generator().manual_seed(run.options.seed * 1_000_003 + position)
    return BlockTraining(block, run.hyperparameters, run.schedule.block_steps, generator)


def write(run: LocalRun, trained: TrainedBlocks, stage: Path, step: dict[str, Any]) -> None:
    """Every tensor to the byte as it was, or as it was trained."""
    from shortstack.pruning.prune import copy_weights

    checkpoint = run.checkpoint
    cut = cut_blocks(checkpoint, range(checkpoint.depth))
    tensors = tuple(replace(copy, source=trained.tensors.get(copy.source.name, copy.source)) for copy in cut.tensors)
    files = copy_weights(checkpoint, replace(cut, tensors=tensors), stage, False, run.progress)
    step = {**step, "trained_blocks": [checkpoint.original_blocks[at] for at in run.schedule.chosen]}
    write_beside_weights(checkpoint, stage, config=cut.config, step=step, files=files, progress=run.progress)


def measure(run: LocalRun, trained: TrainedBlocks, checkpoint: Checkpoint) -> dict[str, float]:
    """Figures of a checkpoint on the validation data, which is measured block by block, too."""
    file = states_file(run, trained.states, "measured")
    with computing(run.place.dtype, run.place.device), opened(run, checkpoint) as (model,):
        return run.validation_set.figures(lambda batches: streamed_nll(model, batches, file))


def estimate(run: LocalRun) -> RetrainEstimate:
    """What the run would be, from three measured steps of one block and the way of one batch through another.

    The states that it is measured on are those that go into the first block: what they are changes no time.
    """
    from shortstack.retraining.estimate import beside_the_steps

    schedule, checkpoint = run.schedule, run.checkpoint
    validated = sum(batch["input_ids"].numel() for batch in validation_batches(run))
    needed = states_nbytes(run, _tokens(run) // run.process.world + validated)
    where = chosen_place(run, needed)
    # No more is read, and run, than one step takes.
    short = replace(run, schedule=replace(schedule, pass_steps=1, states=where))
    trained, stepping, passing = _measured(short)
    blocks = schedule.dense.depth + checkpoint.depth
    return RetrainEstimate(
        method=run.hyperparameters.method,
        trained=trained * len(schedule.chosen),
        parameters=checkpoint.parameters(),
        steps=schedule.steps,
        tokens=_tokens(run),
        data=run.dataset.described,
        bytes_per_device=_memory(run, trained, needed, where),
        seconds_per_step=stepping + passing * blocks * schedule.pass_steps / schedule.steps,
        processes=run.process.world,
        notes=[
            f"{len(schedule.chosen)} of {checkpoint.depth} blocks, {schedule.block_steps} steps each",
            f"hidden states take {size(needed)} {'on disk' if where == 'disk' else 'of memory'}",
            *beside_the_steps(checkpoint, run.out, trained, force=run.options.force),
        ],
    )


def _measured(run: LocalRun) -> tuple[int, float, float]:
    """(parameters of a block that are trained, seconds of a step, seconds of the batches' way through a block)."""
    with (
        computing(run.place.dtype, run.place.device),
        opened(run, run.schedule.dense, run.checkpoint) as (dense, pruned),
        streams_of(run, dense, pruned) as streams,
    ):
        position, trained, stepping = run.schedule.chosen[0], 0, 0.0
        for _, block in pruned.weights.each([position]):
            training = _training(run, block, position)
            healing = Healing(run, Monitor(run.progress, 0), pruned, streams, position, training, run.out)
            trained = sum(leaf.numel() for leaf in training.leaves.values())
            stepping = _seconds(healing.try_step)
        return trained, stepping, _seconds(lambda: dense.advance(streams.batches, streams.theirs, [0]))


def _memory(run: LocalRun, trained: int, states: int, where: Where) -> dict[str, int]:
    """Bytes by what they are for; at most, as a block that comes in and one that is trained are never there together."""
    item = run.place.dtype.itemsize
    outside = run.checkpoint.parameters(run.checkpoint.outside_blocks) * item
    return {
        "outside blocks": outside,
        "blocks": 3 * max(run.schedule.dense.block_parameters()) * item,
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
        **({} if where == "disk" else {"hidden states": states}),
    }


def _seconds(work: Callable[[], object]) -> float:
    """What it takes: the median of three, of which the first one allocates."""
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return sorted(taken)[1]
