"""One retraining run, whatever the method: open, check, train or resume, save, publish, compare."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from shortstack.artifacts.provenance import versions
from shortstack.artifacts.training import NATS
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.extras import need_packages
from shortstack.common.json_text import read_json
from shortstack.common.phases import phase
from shortstack.common.process_state import logging_at, same_random_state
from shortstack.common.progress import Progress
from shortstack.data.row_prompt import AS_PUBLISHED
from shortstack.data.tokenizer import load_tokenizer
from shortstack.errors import ShortstackError
from shortstack.families.open_model import open_model
from shortstack.retraining.options import Hyperparameters, TrainingOptions
from shortstack.retraining.results import Measure, RetrainEstimate, RetrainResult, whole_figures
from shortstack.retraining.run_folder import STREAM, Monitor, Session, step_of
from shortstack.runtime.atomic_output import check_output
from shortstack.runtime.distributed import Process
from shortstack.runtime.workspace import workspace

if TYPE_CHECKING:
    import torch

    from shortstack.data.collators import Batch
    from shortstack.data.loaders import Feed
    from shortstack.retraining.losses import Objective
    from shortstack.retraining.trainer import RetrainTrainer
    from shortstack.retraining.validation import HeldOut

_SHORTEST_WARM_UP = 10  # a tenth of a run that its warm-up would fill by more than half


# Given the student, its checkpoint, its dtype and device: the loss.
MakeObjective = Callable[[Any, Checkpoint, "torch.dtype", "torch.device"], "Objective"]
# Given the tokenizer and the hyperparameters: what is trained on, where that is not a SOURCE.
OpenFeed = Callable[[Hyperparameters], "Feed"]


@same_random_state()  # the Trainer seeds the process's generators, and sets the level of transformers' logger
@logging_at("transformers", logging.ERROR)
def retrain(
    model: str,
    data: str | None,
    out: Path,
    hyperparameters: Hyperparameters,
    options: TrainingOptions,
    *,
    make_objective: MakeObjective | None = None,
    feed_from: OpenFeed | None = None,
    merge: bool = True,
    run_of: Callable[..., Run] | None = None,
) -> RetrainResult | RetrainEstimate | None:
    """Train a checkpoint by its hyperparameters and write the result; None in processes other than the first.

    Raises:
        ShortstackError: anything that a user can cause; docs/faults.md has a list.
    """
    if hyperparameters.lora is not None:
        need_packages("--train lora", "peft", extra="retrain")
    process = Process.from_environment()
    progress = Progress(quiet=options.quiet or not process.leads)
    checkpoint = open_model(model, allow_links=options.allow_links, tokenizer=options.tokenizer, progress=progress)
    hyperparameters = _fitted(checkpoint, hyperparameters, progress)
    make = run_of or Run
    run = make(checkpoint, Path(out), hyperparameters, options, process, progress, make_objective, merge)
    _check_request(run)
    with workspace(out, leads=process.leads and not options.dry_run) as work:
        run.prepare(data, feed_from, work)
        if options.dry_run:
            return run.estimate()
        try:
            run.train()
        except KeyboardInterrupt:
            steps = run.session.complete_steps()
            progress.say(f"the same command resumes from step {steps[-1]}" if steps else "no checkpoint was saved yet")
            raise
        if not process.leads:
            return None
        from shortstack.retraining.export import publish

        return publish(run)


def _check_request(run: Run) -> None:
    checkpoint = run.checkpoint
    if "quantization_config" in checkpoint.config:
        raise ShortstackError(
            f"{checkpoint.source}: is quantized; its weights cannot be trained",
            hint="retrain the checkpoint before quantization, then quantize the result",
        )
    if not run.options.dry_run:
        check_output(run.out, inputs=run.inputs, force=run.options.force)


def _fitted(checkpoint: Checkpoint, hyperparameters: Hyperparameters, progress: Progress) -> Hyperparameters:
    positions = checkpoint.positions
    if positions is not None and hyperparameters.seq_len > positions:
        progress.say(
            f"{checkpoint.source} has {positions} positions: {hyperparameters.seq_len} tokens are cut to {positions}"
        )
        return replace(hyperparameters, seq_len=positions)
    return hyperparameters


@dataclass
class Run:
    """One run, from its request to its result."""

    checkpoint: Checkpoint
    out: Path
    hyperparameters: Hyperparameters
    options: TrainingOptions
    process: Process
    progress: Progress
    make_objective: MakeObjective | None
    merge: bool
    unit: ClassVar[str] = NATS  # of the losses in its metrics

    def prepare(self, data: str | None, feed_from: OpenFeed | None, work: Path) -> None:
        """Read the data, count the steps, and find where to begin."""
        from shortstack.data.collators import Shares
        from shortstack.retraining.placement import Place, check_trackers

        options, hyperparameters = self.options, self.hyperparameters
        check_trackers(options.report_to)
        self.place = Place.find(options.device, options.dtype, self.checkpoint, self.process)
        self.feed = feed_from(hyperparameters) if feed_from is not None else self._read(str(data))
        self.held_out = self._held_out()
        self.shares = Shares(hyperparameters.batch, hyperparameters.micro_batch, self.process.rank, self.process.world)
        self.steps, scheduled = self._count_steps()
        self._shorten_warm_up(scheduled)
        self.session = Session(work, self._key(), self.process)
        self.resumed: Path | None = None
        if options.dry_run:
            return
        for leads in (True, False):  # the first process decides, the others follow
            if self.process.leads == leads:
                self.resumed = self.session.begin(
                    restart=options.restart,
                    force=options.force,
                    weights_only=options.weights_only_resume,
                    progress=self.progress,
                )
            self.place.meet(self.process)

    def _read(self, data: str) -> Feed:
        from shortstack.data.loaders import open_feed

        self.tokenizer = load_tokenizer(self.checkpoint, trust_remote_code=self.options.trust_remote_code)
        return open_feed(
            data,
            self.tokenizer,
            seq_len=self.hyperparameters.seq_len,
            seed=self.options.seed,
            validation=self.options.validation,
            isolated=self.hyperparameters.isolate_documents,
            group_by_length=self.hyperparameters.group_by_length,
            progress=self.progress,
            embedding_rows=self.checkpoint.embedding_rows,
            prompt=self.hyperparameters.prompt or AS_PUBLISHED,
        )

    def _held_out(self) -> HeldOut:
        from shortstack.retraining.validation import HeldOut, text_batches

        texts: dict[str, list[Batch]] = {}
        described: dict[str, dict[str, Any]] = {}
        if self.options.eval_data:
            tokenizer = load_tokenizer(self.checkpoint, trust_remote_code=self.options.trust_remote_code)
            texts, described = text_batches(
                self.options.eval_data,
                tokenizer,
                self.checkpoint,
                limit=self.options.eval_windows,
                progress=self.progress,
            )
        return HeldOut(self.feed.held_out, texts, described)

    def _count_steps(self) -> tuple[int, int]:
        """(optimizer steps in all, those that the learning rate's schedule is spread over)."""
        limit, hyperparameters = self.options.max_steps, self.hyperparameters
        # Which tokens are trained on is the hyperparameters' affair; a limit of steps cuts it short.
        if limit is not None and hyperparameters.tokens is None:
            return limit, limit
        steps = self.feed.steps(hyperparameters.batch, epochs=hyperparameters.epochs, tokens=hyperparameters.tokens)
        steps = min(steps, limit or steps)
        return steps, steps

    def _shorten_warm_up(self, steps: int) -> None:
        if self.hyperparameters.warmup_steps > steps // 2:
            shorter = steps // _SHORTEST_WARM_UP
            self.progress.say(
                f"warm-up of {self.hyperparameters.warmup_steps} steps shortened to {shorter}: {steps} steps in all"
            )
            self.hyperparameters = replace(self.hyperparameters, warmup_steps=shorter)

    def _key(self) -> dict[str, Any]:
        """All that makes the run: a checkpoint of a run with another key is not resumed."""
        return {
            "model": self.checkpoint.fingerprint,
            "data": self.feed.described["sha256"],
            "eval data": {name: record["sha256"] for name, record in self.held_out.described.items()},
            "hyperparameters": {**asdict(self.hyperparameters), "betas": list(self.hyperparameters.betas)},
            "steps": self.steps,
            "validation": self.options.validation,
            "seed": self.options.seed,
            "tokenizer": self.checkpoint.tokenizer.sha256 if self.checkpoint.tokenizer is not None else None,
            "save_every": self.options.save_every,
            "world size": self.process.world,
            "parallelism": self.place.parallelism,
            "device": self.place.device.type,
            "dtype": self.place.name,
            "versions": versions("peft", "accelerate"),
        }

    # ---- the work

    def _loaded(self) -> tuple[Any, Objective]:
        """The model with what is to be trained, and the loss."""
        import torch

        from shortstack.retraining.losses import NextToken
        from shortstack.retraining.trainable import set_trainable, trained_count, with_adapter, without_adapter

        torch.manual_seed(self.options.seed)  # the adapter's beginning
        checkpoint, hyperparameters = self.checkpoint, self.hyperparameters
        model = self.place.load(
            checkpoint,
            trains_all=hyperparameters.lora is None,
            in_4bit=hyperparameters.load_in_4bit,
            options=self.options,
        )
        if hyperparameters.lora is not None:
            model = with_adapter(model, checkpoint, hyperparameters.lora)
            line = without_adapter(model, checkpoint)
            if line and hyperparameters.lora.target_modules is None:
                self.progress.say(line)
        else:
            set_trainable(model, checkpoint, hyperparameters.train)
            if checkpoint.tied and {"head", "embeddings"} & set(hyperparameters.train.split(",")):
                self.progress.say(f"{checkpoint.source}: head and embedding are one tensor: both are trained")
        self.trained, self.parameters = trained_count(model)
        self.progress.say(f"{self.trained} of {self.parameters} parameters are trained, in {self.place.name}")
        self._check_isolation(model)
        if self.make_objective is None:
            return model, NextToken()
        return model, self.make_objective(model, checkpoint, self.place.dtype, self.place.device)

    def _check_isolation(self, model: Any) -> None:
        from shortstack.data.loaders import StreamFeed
        from shortstack.retraining.trainable import isolates_documents

        if isinstance(self.feed, StreamFeed) and self.hyperparameters.isolate_documents:
            rows = self.checkpoint.tensors[self.checkpoint.anatomy.embedding].shape[0]
            if not isolates_documents(model, rows):
                self.progress.say(
                    f"{self.checkpoint.source}: attention crosses the documents of a window in this family "
                    "(tried on two short ones); the loss does not"
                )

    @property
    def writes_checkpoint(self) -> bool:
        """Whether the output is a checkpoint, and not an adapter alone."""
        return self.hyperparameters.lora is None or self.merge

    def train(self) -> None:
        """Train, or resume, to the last step; then the best or the last weights are in the model."""
        from shortstack.retraining.trainer import RetrainTrainer, Watch

        model, objective = self._loaded()
        done, stream = step_of(self.resumed) if self.resumed is not None else 0, {}
        if self.resumed is not None and (self.resumed / STREAM).is_file():
            stream = read_json((self.resumed / STREAM).read_bytes())
        loader = self.feed.loader(self.shares, done, self.steps, stream, self.options.workers)
        monitor = Monitor(
            self.progress,
            self.steps,
            self._flops_per_token(),
            self.place.peak_flops(self.process) if self.process.leads else 0,
        )
        options = self.options
        self.trainer: RetrainTrainer = RetrainTrainer(
            model,
            self.place.arguments(self.hyperparameters, options, self.steps, self.shares, self.session.checkpoints),
            objective=objective,
            loader=loader,
            stream=stream,
            session=self.session,
            watch=Watch(
                monitor,
                lambda measured: self.held_out.measure(measured, self.place.device, self.process),
                self.hyperparameters.keep == "best",
                options.log_every,
                options.eval_every,
                options.save_every,
            ),
        )
        self.trainer.restore_best()
        self.trainer.guard.tokens = max((line.get("tokens", 0) for line in self.session.read_metrics()), default=0)
        from shortstack.engine.cpu import computing

        with computing(self.place.dtype, self.place.device):
            if done < self.steps or self.place.is_sharded:
                with phase("training"):
                    self.trainer.train(resume_from_checkpoint=str(self.resumed) if self.resumed else None)
            else:
                self.trainer._load_from_checkpoint(str(self.resumed))
        self.place.meet(self.process)
        self.trainer.restore_best()  # what the first process noted
        best = self.trainer.best.get("step")
        if self.hyperparameters.keep == "best" and best is not None and best != self.steps:
            self.progress.say(f"the weights of step {best} had the lowest validation loss and are kept")
            self.trainer._load_from_checkpoint(str(self.session.at(best)), self.trainer.model_wrapped)
        self.weights = self.trainer.trained_parameters()  # gathered by all processes together
        self.place.part(self.process)

    @property
    def inputs(self) -> list[Path]:
        """Directories that the output may not touch."""
        return [self.checkpoint.directory]

    @property
    def tokens(self) -> int:
        """Tokens that were trained on; padding is not counted."""
        return self.trainer.guard.tokens

    @property
    def kept_step(self) -> int:
        """The step whose weights are the result."""
        return self.trainer.best.get("step", self.steps) if self.hyperparameters.keep == "best" else self.steps

    @property
    def measure(self) -> Measure:
        """How the models of the table at the end are measured."""
        return functools.partial(whole_figures, held_out=self.held_out, options=self.options)

    def write(self, stage: Path, step: dict[str, Any]) -> None:
        """Write the result into an empty directory; `step` is for its history."""
        from shortstack.retraining.export import write_trained

        write_trained(self, stage, step)

    def _flops_per_token(self) -> float:
        """Two for each weight forwards, two for each activation's gradient, two more for each weight's own."""
        embedding = self.checkpoint.tensors[self.checkpoint.anatomy.embedding].numel
        products = self.checkpoint.parameters() - (0 if self.checkpoint.tied else embedding)
        return (4 if self.hyperparameters.lora is not None else 6) * products

    def estimate(self) -> RetrainEstimate:
        """What the run would be, from three measured steps."""
        from shortstack.retraining.estimate import beside_the_steps, measured_estimate

        model, objective = self._loaded()
        seconds, memory = measured_estimate(
            model,
            objective,
            self.feed,
            self.shares,
            self.place,
            options=self.options,
            hyperparameters=self.hyperparameters,
        )
        return RetrainEstimate(
            method=self.hyperparameters.method,
            trained=self.trained,
            parameters=self.parameters,
            steps=self.steps,
            tokens=self.feed.tokens(self.steps, self.hyperparameters.batch),
            data=self.feed.described,
            bytes_per_device=memory,
            seconds_per_step=seconds,
            processes=self.process.world,
            notes=beside_the_steps(self.checkpoint, self.out, self.trained, force=self.options.force),
        )
