"""Distillation: the pruned model learns what the dense one would have said, from the dense one or from its notes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.formatting import size
from shortstack.common.option_values import Listed
from shortstack.common.options import records_of, refuse_idle, stage
from shortstack.common.progress import Progress
from shortstack.errors import ShortstackError, UsageError
from shortstack.families.open_model import open_model
from shortstack.retraining.cpt import with_cosine
from shortstack.retraining.estimate import check_steps, check_training
from shortstack.retraining.options import (
    DistillationSteps,
    Hyperparameters,
    LoRA,
    Teaching,
    TrainingOptions,
)
from shortstack.retraining.results import RetrainEstimate, RetrainResult
from shortstack.retraining.run import retrain
from shortstack.retraining.whole_run import whole_model

if TYPE_CHECKING:
    import torch

    from shortstack.data.loaders import Dataset
    from shortstack.retraining.losses import Objective
    from shortstack.retraining.teacher_cache import TeacherCache

_TEACHING, _STEPS, _LORA, _DEFAULTS = Teaching(), DistillationSteps(), LoRA(), TrainingOptions()


@stage
def retrain_distill(
    model: str,
    *,
    out: Path,
    data: str | None = None,
    teaching: Teaching = _TEACHING,
    train: Listed = "all",
    steps: DistillationSteps = _STEPS,
    lora: LoRA = _LORA,
    options: TrainingOptions = _DEFAULTS,
) -> RetrainResult | RetrainEstimate | None:
    """Train a pruned checkpoint with the dense model as teacher: on its logits, and its hidden states if requested.

    The loss is kl_weight x KL(teacher || student) + loss_weight x next-token loss + hidden_weight x the distance of
    hidden states, a mean over predicted tokens. shortstack.json maps the blocks: the output of a remaining block is
    compared with the output of the same block in the dense model.

    Source: knowledge distillation (Hinton et al. 2015, arXiv 1503.02531).

    Args:
        model: The pruned checkpoint: a directory, a hub id such as `org/name@revision`, or `embedded`.
        out: Write the checkpoint to this directory.
        data: The data to train on with `teacher`: text, or rows of instructions.
        teaching: the teacher, and what is learned from it.
        train: The parameters to train: `all`, `lora`, or some of `last:N`, `first:N`, `head`, `norm`, `embeddings`,
            separated by commas.
        steps: the steps of the optimizer.
        lora: the adapter, for `--train lora`.
        options: how the run computes.

    Returns:
        Figures before, after and of the dense model; with `dry_run`, the forecast of the run.

    Raises:
        ShortstackError: student, teacher and data do not fit together, or the loss is no longer finite.
    """
    weights: dict[str, Any] = {
        "kl_weight": teaching.kl_weight, "loss_weight": teaching.loss_weight, "hidden_weight": teaching.hidden_weight
    }  # fmt: skip
    _refuse_idle(teaching, train, steps, lora, options)
    _check_source(teaching, data)
    progress = Progress(quiet=True)
    student = open_model(model, allow_links=options.allow_links, tokenizer=options.tokenizer, progress=progress)
    if teaching.offline is not None:
        from shortstack.retraining.teacher_cache import cached_dataset, open_teacher_cache

        cache = open_teacher_cache(Path(teaching.offline))
        made: _Offline | _Online = _Offline(cache, _same_temperature(cache, teaching.temperature), weights)
        made.check(student)
    else:
        made = _Online(
            _dense(student, teaching.teacher),
            1.0 if teaching.temperature is None else teaching.temperature,
            weights,
            options,
        )
        made.check(student)
    with_adapter = train == "lora"
    hyperparameters = with_cosine(
        "distill",
        steps,
        train=train,
        epochs=steps.epochs,
        weight_decay=0.0 if with_adapter else steps.weight_decay,
        lora=lora if with_adapter else None,
        isolate_documents=steps.isolate_documents,
        distillation=made.described(),
    )

    def dataset_from(fitted: Hyperparameters) -> Dataset:
        return cached_dataset(cache, fitted, options.seed)

    taught = dataset_from if teaching.offline is not None else None
    way = whole_model(make_objective=made.objective, dataset_from=taught)
    return retrain(model, data, out, hyperparameters, options, way)


def _refuse_idle(
    teaching: Teaching, train: str, steps: DistillationSteps, lora: LoRA, options: TrainingOptions
) -> None:
    """Refuse what has no effect on this student."""
    if teaching.offline is not None:
        why = "with --offline: the rows are those of the cache"
        refuse_idle(steps, ["seq_len", "isolate_documents"], why)
        refuse_idle(options, ["validation"], why)
    if train == "lora":
        refuse_idle(steps, ["weight_decay"], "with --train lora")
    else:
        refuse_idle(lora, ["rank", "alpha", "dropout", "target_modules"], f"with --train {train}: there is no adapter")


def _check_source(teaching: Teaching, data: Any) -> None:
    """Refuse two sources of what is trained on, or none."""
    if teaching.offline is None:
        if data is None:
            raise UsageError("nothing to train on", hint="give --data SOURCE, or --offline DIR from shortstack teach")
    elif teaching.teacher is not None or data is not None or teaching.hidden_weight:
        raise UsageError(
            "--offline has data and teacher; it cannot be combined with --teacher, --data or --hidden-weight",
            hint="leave them out, or leave out --offline",
        )


def check_distill(values: Mapping[str, Any]) -> list[str]:
    """Look at options that contradict one another, and at the data; lines about what could not be looked at.

    Raises:
        ShortstackError: they do, or the data cannot be used.
    """
    records = records_of(retrain_distill, values)
    train = values.get("train", "all")
    _refuse_idle(records["teaching"], train, records["steps"], records["lora"], records["options"])
    _check_source(records["teaching"], values.get("data"))
    check_steps(records["steps"])
    return check_training(values)


def _same_temperature(cache: TeacherCache, asked: float | None) -> float:
    taught = float(cache.record["settings"]["temperature"])
    if asked is not None and asked != taught:
        raise UsageError(
            f"--temperature {asked}: {cache.folder} was made with temperature {taught}",
            hint="leave --temperature out, or run shortstack teach again",
        )
    return taught


def _dense(student: Checkpoint, teacher: str | None) -> Checkpoint:
    source = teacher or (student.provenance or {}).get("source")
    if source is None:
        raise UsageError(f"{student.source}: does not record which model it was derived from", hint="--teacher DENSE")
    return open_model(source, allow_links=student.allow_links, progress=Progress(quiet=True))


class _Offline:
    """The teacher's notes."""

    def __init__(self, cache: TeacherCache, temperature: float, weights: dict[str, Any]) -> None:
        self._cache, self._temperature, self._weights = cache, temperature, weights

    def check(self, student: Checkpoint) -> None:
        """Refuse notes of another vocabulary."""
        rows = student.tensors[student.anatomy.embedding].shape[0]
        _check_vocabulary(student, rows, int(self._cache.record["vocabulary"]), str(self._cache.record["teacher"]))

    def described(self) -> dict[str, Any]:
        """For records."""
        record = self._cache.record
        return {**self._weights, "temperature": self._temperature, "teacher": record["fingerprint"],
                "top_k": record["settings"]["top_k"]}  # fmt: skip

    def objective(self, model: Any, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Objective:
        """The loss; the teacher's part comes with each batch."""
        from shortstack.retraining.losses import Distillation

        return Distillation(temperature=self._temperature, **self._weights)


class _Online:
    """The teacher itself, beside the student."""

    def __init__(
        self, teacher: Checkpoint, temperature: float, weights: dict[str, Any], options: TrainingOptions
    ) -> None:
        self._teacher, self._temperature, self._weights, self._options = teacher, temperature, weights, options

    def check(self, student: Checkpoint) -> None:
        """Refuse a teacher of another vocabulary, or one whose blocks the student's are not."""
        teacher = self._teacher
        sizes = [c.tensors[c.anatomy.embedding].shape[0] for c in (student, teacher)]
        _check_vocabulary(student, sizes[0], sizes[1], teacher.source)
        if self._weights["hidden_weight"] and not set(student.original_blocks) <= set(teacher.original_blocks):
            raise ShortstackError(
                f"{student.source}: its blocks are not all in {teacher.source}, so hidden states cannot be compared",
                hint="give the model that MODEL was pruned from, or --hidden-weight 0",
            )

    def described(self) -> dict[str, Any]:
        """For records."""
        return {**self._weights, "temperature": self._temperature, "teacher": self._teacher.fingerprint}

    def objective(self, model: Any, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Objective:
        """The loss, with the teacher loaded and each of the student's blocks beside its original."""
        from shortstack.engine.load import load_model
        from shortstack.engine.stand_ins import find_blocks
        from shortstack.retraining.losses import Distillation
        from shortstack.runtime.memory import available_bytes

        needed, free = self._teacher.parameters() * dtype.itemsize, available_bytes(device)
        if needed > free:
            cached = f"shortstack teach {self._teacher.source} --data DATA --out NOTES, then --offline NOTES"
            raise ShortstackError(
                f"{self._teacher.source}: the teacher needs {size(needed)} beside the student, {size(free)} free on {device}",
                hint="to learn hidden states without it in memory: shortstack retrain local"
                if self._weights["hidden_weight"]
                else f"cache its logits, which reads it one block at a time: {cached}",
            )
        name: Any = str(dtype).removeprefix("torch.")
        dense, _, _ = load_model(
            self._teacher, dtype=name, device=str(device), trust_remote_code=self._options.trust_remote_code
        )
        dense.requires_grad_(False)
        _, ours = find_blocks(model, checkpoint.anatomy)
        _, theirs = find_blocks(dense, self._teacher.anatomy)
        pairs = (
            [
                (ours[place], theirs[self._teacher.position_of(original)])
                for place, original in enumerate(checkpoint.original_blocks)
            ]
            if self._weights["hidden_weight"]
            else []
        )
        return Distillation(temperature=self._temperature, teacher=dense, block_pairs=pairs, **self._weights)


def _check_vocabulary(student: Checkpoint, ours: int, theirs: int, teacher: str) -> None:
    if ours != theirs:
        raise ShortstackError(
            f"{student.source} has {ours} tokens, the teacher {teacher} {theirs}: their logits cannot be compared",
            hint="give the model that the student was pruned from",
        )
