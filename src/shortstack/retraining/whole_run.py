"""A run that trains a model as a whole, in the loop of transformers' Trainer: lora, cpt and distill."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.artifacts.provenance import FILE_NAME
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.json_text import read_json
from shortstack.common.phases import phase
from shortstack.retraining.options import Hyperparameters
from shortstack.retraining.results import RetrainEstimate
from shortstack.retraining.run import Prepared, Request, Schedule, Trained, Way
from shortstack.retraining.run_folder import STREAM, Monitor, step_of
from shortstack.runtime.atomic_output import published, write_json

if TYPE_CHECKING:
    import torch

    from shortstack.data.loaders import Dataset
    from shortstack.retraining.losses import Objective
    from shortstack.retraining.placement import Place
    from shortstack.retraining.trainer import RetrainTrainer

# Given the student, its checkpoint, its dtype and device: the loss.
MakeObjective = Callable[[Any, Checkpoint, "torch.dtype", "torch.device"], "Objective"]


@dataclass(frozen=True)
class TrainedModel(Trained):
    """What training a whole model gave.

    Attributes:
        weights: the trained parameters by name, whole and on the CPU.
        adapter: the folder of the trained adapter, where one was trained.
    """

    weights: dict[str, torch.Tensor] = field(repr=False)
    adapter: Path | None


def whole_model(
    *,
    make_objective: MakeObjective | None = None,
    dataset_from: Callable[[Hyperparameters], Dataset] | None = None,
    merge: bool = True,
) -> Way[Schedule, TrainedModel]:
    """Train the model as a whole.

    Args:
        make_objective: what makes the loss; by default it is that of the next token.
        dataset_from: what is trained on, where that is not a SOURCE.
        merge: write a checkpoint with the adapter folded in, and not the adapter alone.
    """
    return Way(
        schedule=schedule,
        train=functools.partial(train, make_objective=make_objective),
        estimate=functools.partial(estimate, make_objective=make_objective),
        write=functools.partial(write, merge=merge),
        measure=measure,
        open_dataset=dataset_from,
        writes_checkpoint=merge,
    )


def schedule(request: Request, _: Place, dataset: Dataset) -> Schedule:
    """As many steps as the data make, or as were requested."""
    limit, hyperparameters = request.options.max_steps, request.hyperparameters
    # Which tokens are trained on is the hyperparameters' affair; a limit of steps cuts it short.
    if limit is not None and hyperparameters.tokens is None:
        return Schedule(limit, limit)
    steps = dataset.steps(hyperparameters.batch, epochs=hyperparameters.epochs, tokens=hyperparameters.tokens)
    steps = min(steps, limit or steps)
    return Schedule(steps, steps)


@dataclass(frozen=True)
class _Loaded:
    """A model with what is to be trained of it, and the loss.

    Attributes:
        trained, parameters: how many parameters are trained, and all.
    """

    model: Any
    objective: Objective
    trained: int
    parameters: int


def _loaded(prepared: Prepared[Schedule], make_objective: MakeObjective | None) -> _Loaded:
    import torch

    from shortstack.retraining.losses import NextToken
    from shortstack.retraining.trainable import trained_count

    torch.manual_seed(prepared.options.seed)  # the adapter's beginning
    checkpoint, place, hyperparameters = prepared.checkpoint, prepared.place, prepared.hyperparameters
    model = place.load(
        checkpoint,
        trains_all=hyperparameters.lora is None,
        in_4bit=hyperparameters.load_in_4bit,
        options=prepared.options,
    )
    model = _trainable(prepared, model)
    trained, parameters = trained_count(model)
    prepared.progress.say(f"{trained} of {parameters} parameters are trained, in {place.name}")
    _check_isolation(prepared, model)
    objective = NextToken() if make_objective is None else make_objective(model, checkpoint, place.dtype, place.device)
    return _Loaded(model, objective, trained, parameters)


def _trainable(prepared: Prepared[Schedule], model: Any) -> Any:
    """The model, with an adapter or with the requested parameters trainable."""
    from shortstack.retraining.trainable import set_trainable, with_adapter, without_adapter

    checkpoint, hyperparameters, progress = prepared.checkpoint, prepared.hyperparameters, prepared.progress
    if hyperparameters.lora is not None:
        model = with_adapter(model, checkpoint, hyperparameters.lora)
        line = without_adapter(model, checkpoint)
        if line and hyperparameters.lora.target_modules is None:
            progress.say(line)
        return model
    set_trainable(model, checkpoint, hyperparameters.train)
    if checkpoint.tied and {"head", "embeddings"} & set(hyperparameters.train.split(",")):
        progress.say(f"{checkpoint.source}: head and embedding are one tensor: both are trained")
    return model


def _check_isolation(prepared: Prepared[Schedule], model: Any) -> None:
    from shortstack.data.loaders import StreamDataset
    from shortstack.retraining.trainable import isolates_documents

    checkpoint = prepared.checkpoint
    if isinstance(prepared.dataset, StreamDataset) and prepared.hyperparameters.isolate_documents:
        rows = checkpoint.tensors[checkpoint.anatomy.embedding].shape[0]
        if not isolates_documents(model, rows):
            prepared.progress.say(
                f"{checkpoint.source}: in this family attention crosses the documents of a window (tested on two short "
                "documents); the loss does not"
            )


def train(prepared: Prepared[Schedule], *, make_objective: MakeObjective | None) -> TrainedModel:
    """Train, or resume, to the last step; the result has the best or the last weights."""
    from shortstack.engine.cpu import computing

    place, process, session, steps = prepared.place, prepared.process, prepared.session, prepared.schedule.steps
    done = step_of(prepared.resumed) if prepared.resumed is not None else 0
    trainer = _trainer(prepared, _loaded(prepared, make_objective), done)
    with computing(place.dtype, place.device):
        if done < steps or place.is_sharded:
            with phase("training"):
                trainer.train(resume_from_checkpoint=str(prepared.resumed) if prepared.resumed else None)
        else:
            trainer._load_from_checkpoint(str(prepared.resumed))
    place.meet(process)
    trainer.restore_best()  # what the first process noted
    keeps_best = prepared.hyperparameters.keep == "best"
    best = trainer.best.get("step")
    if keeps_best and best is not None and best != steps:
        prepared.progress.say(f"the weights of step {best} had the lowest validation loss and are kept")
        trainer._load_from_checkpoint(str(session.at(best)), trainer.model_wrapped)
    weights = trainer.trained_parameters()  # gathered by all processes together
    place.part(process)
    kept_step = steps if best is None or not keeps_best else best
    adapter = _written_adapter(prepared, trainer, weights) if process.leads else None
    return TrainedModel(trainer.guard.tokens, kept_step, weights, adapter)


def _trainer(prepared: Prepared[Schedule], loaded: _Loaded, done: int) -> RetrainTrainer:
    """The loop, ready for the step after so many."""
    from shortstack.retraining.trainer import RetrainTrainer, Watch

    place, process, session, options = prepared.place, prepared.process, prepared.session, prepared.options
    steps, stream = prepared.schedule.steps, {}
    if prepared.resumed is not None and (prepared.resumed / STREAM).is_file():
        stream = read_json((prepared.resumed / STREAM).read_bytes())
    loader = prepared.dataset.loader(prepared.sharding, done, steps, stream, options.workers)
    peak_flops = place.peak_flops(process) if process.leads else 0
    watch = Watch(
        Monitor(prepared.progress, steps, _flops_per_token(prepared), peak_flops),
        lambda measured: prepared.validation_set.measure(measured, place.device, process),
        prepared.hyperparameters.keep == "best",
        options.log_every,
        options.eval_every,
        options.save_every,
    )
    trainer: RetrainTrainer = RetrainTrainer(
        loaded.model,
        place.arguments(prepared.hyperparameters, options, steps, prepared.sharding, session.checkpoints),
        objective=loaded.objective,
        loader=loader,
        stream=stream,
        session=session,
        watch=watch,
    )
    trainer.restore_best()
    trainer.guard.tokens = max((line.get("tokens", 0) for line in session.read_metrics()), default=0)
    return trainer


def _flops_per_token(prepared: Prepared[Schedule]) -> float:
    """Two for each weight forwards, two for each activation's gradient, two more for each weight's own."""
    checkpoint = prepared.checkpoint
    embedding = checkpoint.tensors[checkpoint.anatomy.embedding].numel
    products = checkpoint.parameters() - (0 if checkpoint.tied else embedding)
    return (4 if prepared.hyperparameters.lora is not None else 6) * products


def _written_adapter(
    prepared: Prepared[Schedule], trainer: RetrainTrainer, weights: dict[str, torch.Tensor]
) -> Path | None:
    """The trained adapter in the work folder: the model that it is on is no longer needed after that."""
    from shortstack.retraining.export import stored_model, write_adapter
    from shortstack.retraining.trainable import with_adapter
    from shortstack.retraining.trainer import put_trained

    lora, checkpoint = prepared.hyperparameters.lora, prepared.checkpoint
    if lora is None:
        return None
    model = trainer.accelerator.unwrap_model(trainer.model)
    if prepared.place.is_sharded:  # its weights lie in pieces: the gathered ones go into a fresh model
        trust = prepared.options.trust_remote_code
        model = with_adapter(stored_model(checkpoint, trust_remote_code=trust), checkpoint, lora)
        put_trained(model, weights)
    folder = prepared.session.folder / "adapter"
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed after it
    with published(folder, is_locked=True) as stage:
        write_adapter(model, stage)
    return folder


def write(
    prepared: Prepared[Schedule], trained: TrainedModel, stage: Path, step: dict[str, Any], *, merge: bool
) -> None:
    """The adapter, where there is one, and the checkpoint, where one is wanted."""
    from shortstack.retraining.export import stored_model, write_checkpoint
    from shortstack.retraining.fold import merged_model
    from shortstack.retraining.trainer import put_trained

    checkpoint, options = prepared.checkpoint, prepared.options
    trust = options.trust_remote_code
    prepared.place.release()  # the model and the optimizer of the training
    if trained.adapter is not None:
        adapter = stage / "adapter"
        adapter.mkdir()
        for file in sorted(trained.adapter.iterdir()):
            shutil.copyfile(file, adapter / file.name)  # the bytes alone, with the rights of a new file
        if not merge:
            write_json(stage / FILE_NAME, {"schema": 1, "adapter_of": step})
            return
        model = merged_model(checkpoint, adapter, trust_remote_code=trust, progress=prepared.progress)
    else:
        model = stored_model(checkpoint, trust_remote_code=trust)
        put_trained(model, trained.weights)
    write_checkpoint(checkpoint, model, stage, step, save_dtype=options.save_dtype, progress=prepared.progress)


def measure(prepared: Prepared[Schedule], _trained: TrainedModel, checkpoint: Checkpoint) -> dict[str, float]:
    """Figures of a checkpoint on the validation data, the whole model in memory."""
    from shortstack.engine.load import load_model

    options = prepared.options
    model, _, device = load_model(
        checkpoint, dtype=options.dtype, device=options.device, trust_remote_code=options.trust_remote_code
    )
    return prepared.validation_set.measure(model, device)


def estimate(prepared: Prepared[Schedule], *, make_objective: MakeObjective | None) -> RetrainEstimate:
    """What the run would be, from three measured steps."""
    from shortstack.retraining.estimate import beside_the_steps, measured_estimate

    options, hyperparameters, steps = prepared.options, prepared.hyperparameters, prepared.schedule.steps
    loaded = _loaded(prepared, make_objective)
    seconds, memory = measured_estimate(
        loaded.model,
        loaded.objective,
        prepared.dataset,
        prepared.sharding,
        prepared.place,
        options=options,
        hyperparameters=hyperparameters,
    )
    return RetrainEstimate(
        method=hyperparameters.method,
        trained=loaded.trained,
        parameters=loaded.parameters,
        steps=steps,
        tokens=prepared.dataset.tokens(steps, hyperparameters.batch),
        data=prepared.dataset.described,
        bytes_per_device=memory,
        seconds_per_step=seconds,
        processes=prepared.process.world,
        notes=beside_the_steps(prepared.checkpoint, prepared.out, loaded.trained, force=options.force),
    )
