"""The end of a run: the output written whole, with its history, its metrics, and the table of before and after."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.artifacts.provenance import FILE_NAME, versions
from shortstack.families.open_model import open_checkpoint
from shortstack.retraining.before_after import compare
from shortstack.retraining.fold import merged_model
from shortstack.retraining.monitor import plot_losses
from shortstack.retraining.results import RetrainResult
from shortstack.retraining.saving import stored_model, write_adapter, write_checkpoint
from shortstack.retraining.trainable import with_adapter
from shortstack.retraining.trainer import put_trained
from shortstack.runtime.atomic_output import published, write_json

if TYPE_CHECKING:
    from shortstack.retraining.run import Run


def publish(run: Run) -> RetrainResult:
    """Write the output, and compare what is on the disk with what there was."""
    options, checkpoint = run.options, run.checkpoint
    tokens = run.trainer.guard.tokens
    with published(
        run.out, inputs=[checkpoint.directory], nbytes=checkpoint.nbytes, force=options.force, is_locked=True
    ) as stage:
        _write(run, stage, _record(run, tokens))
        shutil.copyfile(run.session.metrics, stage / "metrics.jsonl")
        title = f"{run.hyperparameters.method} of {checkpoint.source}"
        if not plot_losses(run.session.read_metrics(), stage / "loss.png", title):
            run.progress.say("no loss.png: matplotlib is not installed (pip install 'shortstack[retrain]')")
        after = open_checkpoint(stage, family=checkpoint.anatomy.family) if run.writes_checkpoint else None
        rows, notes = compare(checkpoint, after, run.held_out, options, run.progress)
        write_json(stage / "retraining.json", {"models": rows})
    return RetrainResult(
        out=run.out,
        method=run.hyperparameters.method,
        steps=run.steps,
        tokens=tokens,
        seconds=time.perf_counter() - run.started,
        rows=rows,
        adapter=run.out / "adapter" if run.hyperparameters.lora is not None else None,
        notes=notes,
    )


def _record(run: Run, tokens: int) -> dict[str, Any]:
    """This step of the checkpoint's history."""
    hyperparameters = run.hyperparameters
    return {
        "stage": "retrain",
        "method": hyperparameters.method,
        "source": run.checkpoint.source,
        "fingerprint": run.checkpoint.fingerprint,
        "data": run.feed.described,
        "hyperparameters": {key: value for key, value in asdict(hyperparameters).items() if value is not None},
        "steps": run.steps,
        "kept_step": run.trainer.best.get("step", run.steps) if hyperparameters.keep == "best" else run.steps,
        "tokens": tokens,
        "seed": run.options.seed,
        "processes": run.process.world,
        "parallelism": run.place.parallelism,
        "dtype": run.place.name,
        "device": run.place.device.type,
        **({"forced": run.session.forced} if run.session.forced else {}),
        "versions": versions("peft", "accelerate"),
    }


def _write(run: Run, stage: Path, step: dict[str, Any]) -> None:
    """The adapter, where there is one, and the checkpoint, where one is wanted."""

    checkpoint, lora, trust = run.checkpoint, run.hyperparameters.lora, run.options.trust_remote_code
    adapter = stage / "adapter"
    if lora is not None:
        model = run.trainer.accelerator.unwrap_model(run.trainer.model)
        if run.place.is_sharded:  # its weights lie in pieces: the gathered ones go into a fresh model
            model = with_adapter(stored_model(checkpoint, trust_remote_code=trust), checkpoint, lora)
            put_trained(model, run.weights)
        write_adapter(model, adapter)
        del model
    del run.trainer  # its model and optimizer are no longer needed
    run.place.release()
    if not run.writes_checkpoint:
        write_json(stage / FILE_NAME, {"schema": 1, "adapter_of": step})
        return
    if lora is not None:
        model = merged_model(checkpoint, adapter, trust_remote_code=trust, progress=run.progress)
    else:
        model = stored_model(checkpoint, trust_remote_code=trust)
        put_trained(model, run.weights)
    write_checkpoint(checkpoint, model, stage, step, save_dtype=run.options.save_dtype)
