"""The hidden states that a run over blocks sends through the dense model and the pruned one, in memory or on the disk."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.formatting import size
from shortstack.data.collators import Batch
from shortstack.engine.block_model import NotSeparableError
from shortstack.errors import ShortstackError
from shortstack.retraining.batch_states import BatchModel, BatchStates
from shortstack.retraining.local_schedule import LocalRun
from shortstack.runtime.memory import available_bytes

_STATES_SHARE = 0.5  # of the free memory: what hidden states may take before they lie on disk
_VALIDATED_SHARE = 10  # for this many training batches, one validates each block
_GIVEN = ("input_ids", "attention_mask", "position_ids")

Where = Literal["memory", "disk"]


@dataclass
class Streams:
    """BatchStates on their way, of the batches that are trained on and, behind them, of those that validate.

    Attributes:
        batches: of this process.
        trained: how many of them are trained on.
        where: where the states lie.
        ours: what goes into the pruned model's next block.
        theirs: the dense model's, at the same place; while a block is trained, what it should give.
        before: the dense model's at the block before; None where that does not count.
        depth: blocks of the dense model that `theirs` has come through.
    """

    batches: list[Batch]
    trained: int
    where: Where
    ours: BatchStates
    theirs: BatchStates
    before: BatchStates | None
    depth: int = 0

    @property
    def validation(self) -> range:
        """Numbers of the batches that validate."""
        return range(self.trained, len(self.batches))


@contextlib.contextmanager
def opened(run: LocalRun, *checkpoints: Checkpoint) -> Iterator[tuple[BatchModel, ...]]:
    """Within, models whose blocks come in one at a time; the later ones borrow what they share with the first."""
    with contextlib.ExitStack() as stack:
        models: list[BatchModel] = []
        for checkpoint in checkpoints:
            try:
                model = BatchModel(
                    checkpoint,
                    dtype=run.place.dtype,
                    device=run.place.device,
                    trust_remote_code=run.options.trust_remote_code,
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
def streams_of(run: LocalRun, dense: BatchModel, pruned: BatchModel) -> Iterator[Streams]:
    """Within, the states of all batches before the first block."""
    steps = run.schedule.pass_steps
    loader = run.dataset.loader(run.sharding, 0, steps, {}, 0)
    found = list(itertools.islice(loader, steps * run.sharding.accumulation))
    for error in (batch["error"] for batch in found if "error" in batch):
        raise error
    batches = [{name: batch[name] for name in _GIVEN if name in batch} for batch in (*found, *validation_batches(run))]
    where = chosen_place(run, states_nbytes(run, sum(batch["input_ids"].numel() for batch in batches)))
    made: list[BatchStates] = []
    try:
        for model, name in zip((pruned, dense, dense)[: _count(run)], ("ours", "theirs", "before"), strict=False):
            made.append(model.embedded(batches, states_file(run, where, name)))
        ours, theirs, *before = made
        yield Streams(batches, len(found), where, ours, theirs, before[0] if before else None)
    finally:
        for states in made:
            states.close()
        shutil.rmtree(run.session.folder / "states", ignore_errors=True)


def states_file(run: LocalRun, where: Where, name: str) -> Path | None:
    """Where states lie, if not in memory: every process has its own."""
    if where == "memory" or run.options.dry_run:
        return None
    return run.session.folder / "states" / f"{name}-{run.process.rank}.bin"


def validation_batches(run: LocalRun) -> list[Batch]:
    """The batches that this process validates a block on: not many more than a tenth of what it trains on."""
    few = max(1, run.schedule.pass_steps * run.sharding.accumulation * run.process.world // _VALIDATED_SHARE)
    return run.dataset.validation[:few][run.process.rank :: run.process.world]


def states_nbytes(run: LocalRun, tokens: int) -> int:
    """Bytes of the states of so many tokens."""
    width = run.checkpoint.tensors[run.checkpoint.anatomy.embedding].shape[1]
    return _count(run) * tokens * width * run.place.dtype.itemsize


def _count(run: LocalRun) -> int:
    """States that are kept of every token."""
    return 3 if run.schedule.settings["update_weight"] else 2


def chosen_place(run: LocalRun, needed: int) -> Where:
    """Memory or disk, where that is left open; too little room is an error before anything is computed.

    Raises:
        ShortstackError: there is too little room.
    """
    where = run.schedule.states
    if where == "auto":
        where = "disk" if needed > _STATES_SHARE * available_bytes() else "memory"
        if where == "disk":
            run.progress.say(f"hidden states take {size(needed)} and are kept on disk, beside {run.out}")
    free = _free_disk(run) if where == "disk" else available_bytes()
    if needed > free:
        place = f"on the disk of {run.out}" if where == "disk" else "in memory"
        raise ShortstackError(
            f"hidden states take {size(needed)}, {size(free)} are free {place}",
            hint="fewer --tokens" + ("" if where == "disk" else ", or --states disk"),
        )
    return where


def _free_disk(run: LocalRun) -> int:
    folder = next(one for one in run.session.folder.parents if one.exists())
    return shutil.disk_usage(folder).free
