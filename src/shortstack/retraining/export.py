"""Trained weights -> a plain checkpoint, with its history, its metrics, and the table of before and after."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from shortstack.artifacts.provenance import versions
from shortstack.artifacts.training import NATS
from shortstack.checkpoint.byte_copy import read_through
from shortstack.checkpoint.config_file import with_dtype
from shortstack.checkpoint.headers import read_weights
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.clock import command_seconds
from shortstack.common.paths import public_name
from shortstack.common.progress import Progress
from shortstack.engine.load import load_whole, quiet_transformers
from shortstack.errors import ShortstackError
from shortstack.families.open_model import open_checkpoint
from shortstack.publishing.model_card import renew_card, write_beside_weights
from shortstack.retraining.results import RetrainResult, before_and_after
from shortstack.runtime.atomic_output import published, write_json

if TYPE_CHECKING:
    from shortstack.retraining.run import Prepared, S, T, Trained, Way


DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip
_LARGEST_SHARD = "5GB"


def stored_model(checkpoint: Checkpoint, *, trust_remote_code: bool = False, dtype: torch.dtype | None = None) -> Any:
    """The whole model on the CPU, by default in its own precision (float32 where its tensors have several).

    Raises:
        ShortstackError: transformers cannot load it, or would invent weights.
    """
    stored = {tensor.dtype for tensor in checkpoint.tensors.values() if checkpoint.is_parameter(tensor.name)}
    own = DTYPES.get(stored.pop(), torch.float32) if len(stored) == 1 else torch.float32
    return load_whole(checkpoint, dtype=dtype or own, trust_remote_code=trust_remote_code)


def write_checkpoint(
    checkpoint: Checkpoint,
    model: Any,
    directory: Path,
    step: dict[str, Any],
    *,
    save_dtype: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a model as a plain checkpoint, with the files beside it and the record of how it was made.

    Args:
        checkpoint: what the model was loaded from: its config, names, types and other files.
        model: with new values in some of its parameters.
        directory: an empty one (a stage).
        step: what was done, for shortstack.json.
        save_dtype: what every tensor is stored in; by default each as it was.
        progress: where it is reported which files are left out.

    Raises:
        ShortstackError: a value is not finite in the type it is stored in, or transformers wrote other tensors than the
            input has.
    """
    _cast(checkpoint, model, save_dtype)
    # Published ones hold settings (vicuna's temperature without sampling) that transformers refuses to write again.
    model.generation_config = GenerationConfig()
    with quiet_transformers():
        model.save_pretrained(directory, max_shard_size=_LARGEST_SHARD)
    for written in (*directory.glob("*.jinja"), directory / "generation_config.json"):
        written.unlink(missing_ok=True)  # the input's own is copied
    files = _check_written(checkpoint, directory, save_dtype)
    tie_undone = checkpoint.tied and not getattr(model.config, "tie_word_embeddings", True)
    config = _untied(checkpoint) if tie_undone else dict(checkpoint.config)
    if save_dtype is not None:
        config = with_dtype(config, save_dtype)
    write_beside_weights(checkpoint, directory, config=config, step=step, files=files, progress=progress)


def write_adapter(model: Any, directory: Path) -> None:
    """PEFT's own form of an adapter, without its card of blanks."""
    model.save_pretrained(directory)
    (directory / "README.md").unlink(missing_ok=True)


def _cast(checkpoint: Checkpoint, model: Any, save_dtype: str | None) -> None:
    """Each parameter into the type it is stored in; tied ones stay one."""
    main = checkpoint.tensors[checkpoint.anatomy.embedding].dtype
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            known = checkpoint.tensors.get(name)
            dtype = save_dtype or (known.dtype if known is not None else main)
            parameter.data = parameter.data.to(DTYPES.get(dtype, torch.float32))


def _check_written(checkpoint: Checkpoint, directory: Path, save_dtype: str | None) -> dict[str, str]:
    """Read what was written back, once: names, shapes and values are checked; gives the sha256 of every weight file."""
    tensors, shards = read_weights(directory)
    expected = {t.name: t.shape for t in checkpoint.tensors.values() if checkpoint.is_parameter(t.name)}
    found = {name: tensor.shape for name, tensor in tensors.items() if not checkpoint.is_repeated_head(name)}
    # Checkpoints of a bare base model lack the outermost name; what is written has it.
    base = checkpoint.anatomy.family.prefix.partition(".")[0] + "."
    same = expected == found or {name.removeprefix(base): shape for name, shape in found.items()} == {
        name.removeprefix(base): shape for name, shape in expected.items()
    }
    if not same:
        odd = sorted({*expected.items()} ^ {*found.items()})[0][0]
        raise ShortstackError(
            f"{checkpoint.source}: transformers writes other tensors than it read ({odd}); no output was written"
        )
    files = {}
    for shard in shards:
        files[shard.name], broken = read_through(shard, [t for t in tensors.values() if t.file == shard])
        if broken is not None:
            raise ShortstackError(
                f"{checkpoint.source}: {broken} is not finite once it is stored"
                f"{f' in {save_dtype}' if save_dtype else ''}",
                hint="use --save-dtype bfloat16, which has the range of float32",
            )
    return files


def _untied(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config of a checkpoint whose head has become a tensor of its own."""
    config, nested = dict(checkpoint.config), checkpoint.anatomy.family.nested
    config["tie_word_embeddings"] = False
    if nested in config:
        config[nested] = {**config[nested], "tie_word_embeddings": False}
    return config


def publish(prepared: Prepared[S], trained: T, way: Way[S, T]) -> RetrainResult:
    """Write the output, and compare what is on the disk with what there was."""
    options, checkpoint, out = prepared.options, prepared.checkpoint, prepared.out
    inputs = [checkpoint.directory, *way.inputs]
    with published(out, inputs=inputs, nbytes=checkpoint.nbytes, force=options.force, is_locked=True) as stage:
        way.write(prepared, trained, stage, _record(prepared, trained))
        shutil.copyfile(prepared.session.metrics, stage / "metrics.jsonl")
        title = f"{prepared.hyperparameters.method} of {public_name(checkpoint.source)}"
        if not plot_losses(prepared.session.read_metrics(), stage / "loss.png", title, way.unit):
            prepared.progress.say("no loss.png: matplotlib is not installed (pip install 'shortstack[retrain]')")
        after = open_checkpoint(stage, family=checkpoint.anatomy.family) if way.writes_checkpoint else None
        measure = functools.partial(way.measure, prepared, trained)
        rows, notes = before_and_after(checkpoint, after, options, prepared.progress, measure)
        write_json(stage / "retraining.json", {"models": rows})
        if way.writes_checkpoint:
            renew_card(stage)
    return RetrainResult(
        out=out,
        method=prepared.hyperparameters.method,
        steps=prepared.schedule.steps,
        tokens=trained.tokens,
        seconds=command_seconds(),
        rows=rows,
        adapter=out / "adapter" if prepared.hyperparameters.lora is not None else None,
        notes=notes,
    )


def _record(prepared: Prepared[Any], trained: Trained) -> dict[str, Any]:
    """This step of the checkpoint's history."""
    hyperparameters, checkpoint, place = prepared.hyperparameters, prepared.checkpoint, prepared.place
    return {
        "stage": "retrain",
        "method": hyperparameters.method,
        "source": checkpoint.source,
        "fingerprint": checkpoint.fingerprint,
        "data": prepared.dataset.described,
        **({"tokenizer": checkpoint.tokenizer.described()} if checkpoint.tokenizer is not None else {}),
        "hyperparameters": {key: value for key, value in asdict(hyperparameters).items() if value is not None},
        "steps": prepared.schedule.steps,
        "kept_step": trained.kept_step,
        "tokens": trained.tokens,
        "seed": prepared.options.seed,
        "processes": prepared.process.world,
        "parallelism": place.parallelism,
        "dtype": place.name,
        "device": place.device.type,
        **({"forced": prepared.forced} if prepared.forced else {}),
        "versions": versions("peft", "accelerate"),
    }


def plot_losses(metrics: Sequence[dict[str, Any]], path: Path, title: str, unit: str = NATS) -> bool:
    """Draw training and validation loss over steps into a PNG; False where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, label, style in (("loss", "training", "-"), ("validation", "validation", "o-")):
        points = [(line["step"], line[name]) for line in metrics if line.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel(f"loss ({unit})")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend()
    figure.savefig(path, dpi=150)
    return True
