"""One retraining run, whatever the method, in three values: what is prepared, what is trained, and the result."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from shortstack.artifacts.provenance import versions
from shortstack.artifacts.training import NATS
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.extras import need_packages
from shortstack.common.process_state import logging_at, same_random_state
from shortstack.common.progress import Progress
from shortstack.data.row_prompt import AS_PUBLISHED
from shortstack.data.tokenizer import load_tokenizer
from shortstack.errors import ShortstackError
from shortstack.families.open_model import open_model
from shortstack.retraining.options import Hyperparameters, TrainingOptions
from shortstack.retraining.results import RetrainEstimate, RetrainResult
from shortstack.retraining.run_folder import Session
from shortstack.runtime.atomic_output import check_output
from shortstack.runtime.distributed import Process
from shortstack.runtime.workspace import workspace

if TYPE_CHECKING:
    from shortstack.data.collators import Sharding
    from shortstack.data.loaders import Dataset
    from shortstack.retraining.placement import Place
    from shortstack.retraining.validation import ValidationSet

_SHORTEST_WARM_UP = 10  # a tenth of a run that its warm-up would fill by more than half


@dataclass(frozen=True)
class Request:
    """What is to be trained on what, as it was requested; the checkpoint is open.

    Attributes:
        data: a SOURCE; None where what is trained on comes from elsewhere.
    """

    checkpoint: Checkpoint
    data: str | None
    out: Path
    hyperparameters: Hyperparameters
    options: TrainingOptions
    process: Process
    progress: Progress


@dataclass(frozen=True)
class Schedule:
    """How long it is trained.

    Attributes:
        steps: optimizer steps in all.
        spread: those that the learning rate's schedule is spread over.
    """

    steps: int
    spread: int


S = TypeVar("S", bound=Schedule)


@dataclass(frozen=True)
class Prepared(Request, Generic[S]):
    """A run before its first step, or before the one that it resumes with.

    Attributes:
        place: where it is computed.
        dataset: what is trained on.
        validation_set: the data that is never trained on, and the texts of `eval_data`.
        sharding: what of each step is this process's.
        schedule: how long it is trained.
        session: its work folder.
        resumed: the saved state that it resumes from.
        forced: what was different where `--force` resumed in spite of it.
    """

    place: Place
    dataset: Dataset
    validation_set: ValidationSet
    sharding: Sharding
    schedule: S
    session: Session
    resumed: Path | None
    forced: list[str]


@dataclass(frozen=True)
class Trained:
    """A run after its last step.

    Attributes:
        tokens: that were trained on; padding is not counted.
        kept_step: the step whose weights are the result.
    """

    tokens: int
    kept_step: int


T = TypeVar("T", bound=Trained)


@dataclass(frozen=True)
class Way(Generic[S, T]):
    """How a checkpoint is trained: as a whole (`whole_run`), or block by block (`local_run`).

    Attributes:
        schedule: how long it is trained.
        train: from the first step, or the one that it resumes with, to the last.
        estimate: what the run would be, from three measured steps.
        write: the result into an empty directory, with its step for the history.
        measure: figures of a checkpoint for the table at the end.
        open_dataset: what it is trained on, where that is not a SOURCE.
        inputs: directories that the output may not touch, besides the checkpoint's.
        writes_checkpoint: the output is a checkpoint, and not an adapter alone.
        unit: of the losses in its metrics.
    """

    schedule: Callable[[Request, Place, Dataset], S]
    train: Callable[[Prepared[S]], T]
    estimate: Callable[[Prepared[S]], RetrainEstimate]
    write: Callable[[Prepared[S], T, Path, dict[str, Any]], None]
    measure: Callable[[Prepared[S], T, Checkpoint], dict[str, float]]
    open_dataset: Callable[[Hyperparameters], Dataset] | None = None
    inputs: tuple[Path, ...] = ()
    writes_checkpoint: bool = True
    unit: str = NATS


@same_random_state()  # the Trainer seeds the process's generators, and sets the level of transformers' logger
@logging_at("transformers", logging.ERROR)
def retrain(
    model: str,
    data: str | None,
    out: Path,
    hyperparameters: Hyperparameters,
    options: TrainingOptions,
    way: Way[S, T],
) -> RetrainResult | RetrainEstimate | None:
    """Train a checkpoint by its hyperparameters and write the result; None in processes other than the first.

    Raises:
        ShortstackError: anything that a user can cause; docs/faults.md has a list.
    """
    if hyperparameters.lora is not None:
        need_packages("--train lora", "peft", extra="retrain")
    request = _opened(model, data, Path(out), hyperparameters, options)
    checkpoint, process = request.checkpoint, request.process
    if not options.dry_run:
        check_output(out, inputs=[checkpoint.directory, *way.inputs], force=options.force)
    with workspace(out, leads=process.leads and not options.dry_run) as work:
        prepared = prepare(request, way, work)
        if options.dry_run:
            return way.estimate(prepared)
        with _interruptible(prepared):
            trained = way.train(prepared)
        if not process.leads:
            return None
        from shortstack.retraining.export import publish

        return publish(prepared, trained, way)


def _opened(
    model: str, data: str | None, out: Path, hyperparameters: Hyperparameters, options: TrainingOptions
) -> Request:
    """The request, with a checkpoint that can be trained, and windows that fit its positions."""
    process = Process.from_environment()
    progress = Progress(quiet=options.quiet or not process.leads)
    checkpoint = open_model(model, allow_links=options.allow_links, tokenizer=options.tokenizer, progress=progress)
    positions = checkpoint.positions
    if positions is not None and hyperparameters.seq_len > positions:
        progress.say(
            f"{checkpoint.source} has {positions} positions: {hyperparameters.seq_len} tokens are cut to {positions}"
        )
        hyperparameters = replace(hyperparameters, seq_len=positions)
    if "quantization_config" in checkpoint.config:
        raise ShortstackError(
            f"{checkpoint.source}: is quantized; its weights cannot be trained",
            hint="retrain the checkpoint before quantization, then quantize the result",
        )
    return Request(checkpoint, data, out, hyperparameters, options, process, progress)


@contextmanager
def _interruptible(prepared: Prepared[Any]) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        steps = prepared.session.complete_steps()
        said = f"the same command resumes from step {steps[-1]}" if steps else "no checkpoint was saved yet"
        prepared.progress.say(said)
        raise


def prepare(request: Request, way: Way[S, Any], work: Path) -> Prepared[S]:
    """Read the data, count the steps, and find where to begin."""
    from shortstack.data.collators import Sharding
    from shortstack.retraining.placement import Place, check_trackers

    options, hyperparameters, process = request.options, request.hyperparameters, request.process
    check_trackers(options.report_to)
    place = Place.find(options.device, options.dtype, request.checkpoint, process)
    dataset = way.open_dataset(hyperparameters) if way.open_dataset is not None else _read(request)
    validation_set = _validation_set(request, dataset)
    sharding = Sharding(hyperparameters.batch, hyperparameters.micro_batch, process.rank, process.world)
    schedule = way.schedule(request, place, dataset)
    request = _with_fitting_warm_up(request, schedule)
    session = Session(work, _key(request, place, dataset, validation_set, schedule.steps), process)
    resumed, forced = _begun(request, place, session)
    return Prepared(
        **{field.name: getattr(request, field.name) for field in dataclasses.fields(Request)},
        place=place,
        dataset=dataset,
        validation_set=validation_set,
        sharding=sharding,
        schedule=schedule,
        session=session,
        resumed=resumed,
        forced=forced,
    )


def _begun(request: Request, place: Place, session: Session) -> tuple[Path | None, list[str]]:
    """(the saved state to resume from, what was different in the run that it is of)."""
    options, process = request.options, request.process
    begun: tuple[Path | None, list[str]] = None, []
    if options.dry_run:
        return begun
    for leads in (True, False):  # the first process decides, the others follow
        if process.leads == leads:
            begun = session.begin(
                restart=options.restart,
                force=options.force,
                weights_only=options.weights_only_resume,
                progress=request.progress,
            )
        place.meet(process)
    return begun


def _read(request: Request) -> Dataset:
    from shortstack.data.loaders import open_dataset

    checkpoint, options, hyperparameters = request.checkpoint, request.options, request.hyperparameters
    return open_dataset(
        str(request.data),
        load_tokenizer(checkpoint, trust_remote_code=options.trust_remote_code),
        seq_len=hyperparameters.seq_len,
        seed=options.seed,
        validation=options.validation,
        isolated=hyperparameters.isolate_documents,
        group_by_length=hyperparameters.group_by_length,
        progress=request.progress,
        embedding_rows=checkpoint.embedding_rows,
        prompt=hyperparameters.prompt or AS_PUBLISHED,
    )


def _validation_set(request: Request, dataset: Dataset) -> ValidationSet:
    from shortstack.retraining.validation import ValidationSet, text_batches

    checkpoint, options = request.checkpoint, request.options
    if not options.eval_data:
        return ValidationSet(dataset.validation)
    tokenizer = load_tokenizer(checkpoint, trust_remote_code=options.trust_remote_code)
    texts, described = text_batches(
        options.eval_data, tokenizer, checkpoint, limit=options.eval_windows, progress=request.progress
    )
    return ValidationSet(dataset.validation, texts, described)


def _with_fitting_warm_up(request: Request, schedule: Schedule) -> Request:
    steps, warm_up = schedule.spread, request.hyperparameters.warmup_steps
    if warm_up <= steps // 2:
        return request
    shorter = steps // _SHORTEST_WARM_UP
    request.progress.say(f"warm-up of {warm_up} steps shortened to {shorter}: {steps} steps in all")
    return replace(request, hyperparameters=replace(request.hyperparameters, warmup_steps=shorter))


def _key(request: Request, place: Place, dataset: Dataset, validation_set: ValidationSet, steps: int) -> dict[str, Any]:
    """All that makes the run: a checkpoint of a run with another key is not resumed."""
    checkpoint, options = request.checkpoint, request.options
    return {
        "model": checkpoint.fingerprint,
        "data": dataset.described["sha256"],
        "eval data": {name: record["sha256"] for name, record in validation_set.described.items()},
        "hyperparameters": {**asdict(request.hyperparameters), "betas": list(request.hyperparameters.betas)},
        "steps": steps,
        "validation": options.validation,
        "seed": options.seed,
        "tokenizer": checkpoint.tokenizer.sha256 if checkpoint.tokenizer is not None else None,
        "save_every": options.save_every,
        "world size": request.process.world,
        "parallelism": place.parallelism,
        "device": place.device.type,
        "dtype": place.name,
        "versions": versions("peft", "accelerate"),
    }
