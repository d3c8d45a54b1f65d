"""Checkpoint -> the same with its weights in fewer bits, whole or not at all; sizes and perplexity before and after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from shortstack.artifacts.provenance import versions
from shortstack.artifacts.results import Figure
from shortstack.checkpoint.forecast import Estimate, Forecast
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.clock import command_seconds
from shortstack.common.formatting import seconds, size, table
from shortstack.common.options import stage
from shortstack.common.progress import Progress
from shortstack.common.shown import Shown
from shortstack.data.calibration import CalibrationSet, check_windows, draw_windows
from shortstack.data.embedded import say_of_own_text
from shortstack.data.ppl_datasets import evaluation_texts
from shortstack.data.preview import READ_BYTES, preview
from shortstack.data.sources import read_corpus
from shortstack.data.tokenizer import load_tokenizer
from shortstack.errors import ShortstackError, UsageError
from shortstack.evaluation.evaluated_model import Subject
from shortstack.evaluation.options import EvaluationOptions
from shortstack.evaluation.ppl import Windows, check_texts, subject_ppl
from shortstack.families.open_model import open_model
from shortstack.quantization.finish import finish
from shortstack.quantization.layers import LayerChoice, chosen_layers, expected_nbytes, kind_of
from shortstack.quantization.options import CalibrationText, QuantizeOptions
from shortstack.quantization.process import run_worker
from shortstack.quantization.schemes import Scheme, SchemeName, scheme_named
from shortstack.quantization.worker import Job
from shortstack.runtime.atomic_output import check_output, published
from shortstack.runtime.devices import pick_device
from shortstack.runtime.memory import available_bytes

ActOrder = Literal["static", "none"]
_CALIBRATION, _OPTIONS = CalibrationText(), QuantizeOptions()
_PUBLISHED_WINDOW = 2048  # tokens of a calibration window, where the model has as many positions
_PPL_WINDOW = 128  # tokens, as published
_CALIBRATION_BYTES = 32 << 20  # of text that windows are drawn from, at least


@dataclass(frozen=True, repr=False)
class QuantizeResult(Shown):
    """The quantized checkpoint, with sizes and perplexities before and after.

    Attributes:
        out: The new checkpoint.
        source: The checkpoint that was quantized.
        scheme: How the weights are stored, such as W4A16.
        choice: The quantized layers and their group sizes.
        nbytes: The size of all tensors in bytes, before and after.
        ppl: For each text, the perplexity before and after. Lower is better.
        calibration: The calibration windows; None if the scheme needs none.
        files: The sha256 of each file that was written, by its name.
        seconds: The wall-clock time including the measurements, in seconds.
        peak_rss_bytes: The peak memory of the quantization in bytes.
        peak_device_bytes: The peak memory of the GPU in bytes; None without a GPU.
        says: What a user should know about the result.
    """

    out: Path
    source: str
    scheme: str
    choice: LayerChoice
    nbytes: tuple[int, int]
    ppl: dict[str, tuple[Figure, Figure]]
    calibration: dict[str, Any] | None
    files: dict[str, str]
    seconds: float
    peak_rss_bytes: int
    peak_device_bytes: int | None = None
    says: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        before_after = ("before", "after")
        return {
            "schema": 1,
            "out": str(self.out),
            "source": self.source,
            "scheme": self.scheme,
            "groups": {str(size): list(kinds) for size, kinds in self.choice.groups.items()},
            "dense": self.choice.dense,
            "bytes": dict(zip(before_after, self.nbytes, strict=True)),
            "ppl": {
                name: dict(zip(before_after, (figure.to_json() for figure in pair), strict=True))
                for name, pair in self.ppl.items()
            },
            "calibration": self.calibration,
            "files": self.files,
            "seconds": self.seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
            "peak_device_bytes": self.peak_device_bytes,
            "says": self.says,
        }

    def to_text(self) -> str:
        """What a person reads on the terminal."""
        before, after = self.nbytes
        rows = [("bytes", size(before), size(after), f"{after / before - 1:+.1%}")]
        for name, (dense, quantized) in self.ppl.items():
            change = "" if not (dense.value and quantized.value) else f"{quantized.value / dense.value - 1:+.1%}"
            rows.append((f"ppl of {name}", _shown(dense), _shown(quantized), change))
        groups = "; ".join(
            f"{', '.join(kinds)} in {f'groups of {size}' if size else 'whole rows'}"
            for size, kinds in self.choice.groups.items()
        )
        memory = f"{size(self.peak_rss_bytes)} of memory" + (
            f" and {size(self.peak_device_bytes)} of the GPU's" if self.peak_device_bytes else ""
        )
        return "\n".join(
            [
                f"{self.out}: {self.source} in {self.scheme}, in {seconds(self.seconds)}, with at most {memory}",
                table(["", "before", "after", "change"], rows),
                f"quantized: {groups}",
                *self.says,
            ]
        )


def _shown(figure: Figure) -> str:
    if figure.value is None:
        return "-"
    return f"{figure.value:.2f}" + (f" ±{figure.stderr:.2f}" if figure.stderr is not None else "")


@stage
def quantize(
    model: str,
    *,
    out: Path,
    scheme: SchemeName = "W4A16",
    group_size: int | None = None,
    actorder: ActOrder = "static",
    dampening: float = 0.01,
    calibration: CalibrationText = _CALIBRATION,
    options: QuantizeOptions = _OPTIONS,
) -> QuantizeResult:
    """Store the weights of a checkpoint in fewer bits, by GPTQ or a simpler scheme, with llm-compressor.

    The result is a compressed-tensors checkpoint, which transformers and vLLM load. The matrices of the blocks are
    quantized; embedding, output head and norms keep their bytes. The command prints size and perplexity before and
    after.

    Source: GPTQ (Frantar et al. 2022, arXiv 2210.17323), in the implementation of llm-compressor.

    Args:
        model: The checkpoint: a directory, a hub id such as `org/name@revision`, or `embedded`.
        out: Write the checkpoint to this directory.
        scheme: How weights are stored. `W4A16` and `W8A16` are integers of 4 or 8 bits, in groups (GPTQ). `W8A8` is
            integers of 8 bits, activations too (GPTQ). `FP8_DYNAMIC` and `NVFP4A16` are floating-point numbers of 8 or
            4 bits, rounded without calibration.
        group_size: The number of weights that share a scale, in `W4A16` and `W8A16`. Layers whose number of inputs it
            does not divide are not quantized. By default it is, for each kind of layer, the largest of 128, 64 and 32
            that divides this number.
        actorder: The order in which GPTQ rounds the columns of a matrix: `static` rounds those with the largest inputs
            first and keeps groups of neighbouring columns; `none` rounds from left to right.
        dampening: The share of the mean of the Hessian's diagonal that GPTQ adds to the diagonal.
        calibration: the windows.
        options: how the run computes.

    Returns:
        What was quantized, sizes and perplexities.

    Raises:
        ShortstackError: it is quantized already, no layer fits the groups, there is too little text, the machine does
            not support the scheme, or the output cannot be written.
    """
    chosen = scheme_named(scheme)
    progress = Progress(quiet=options.quiet)
    checkpoint = open_model(model, allow_links=options.allow_links, tokenizer=options.tokenizer, progress=progress)
    choice = chosen_layers(checkpoint, chosen, group_size)
    _refuse_device(chosen, options.device)
    check_output(out, inputs=[checkpoint.directory], force=options.force)
    windows = _windows(checkpoint, chosen, calibration, options.trust_remote_code, progress)
    _check_memory(checkpoint, windows)
    expected = expected_nbytes(checkpoint, chosen, choice)
    with published(out, inputs=[checkpoint.directory], nbytes=expected, force=options.force) as folder:
        before = _perplexity(checkpoint, options, progress)
        job = Job(
            str(checkpoint.directory), str(folder), "", chosen.name,
            {str(size): list(kinds) for size, kinds in choice.groups.items()}, windows.windows if windows else [],
            _dtype(checkpoint), actorder, dampening, chosen.gptq, options.trust_remote_code,
        )  # fmt: skip
        total = sum(choice.group_size(kind_of(checkpoint, t) or "") is not None for b in checkpoint.blocks for t in b)
        with progress.bar("matrices", total) as advance:
            report = run_worker(job, source=checkpoint.source, device=options.device, advance=advance)
        choice = choice.without({kind: f"is a {name}" for kind, name in report["not_linear"].items()})
        step = _step(checkpoint, job, choice, windows)
        files = finish(checkpoint, folder, choice, step, progress)
        quantized = replace(open_model(str(folder), progress=progress), source=str(out))
        after = _perplexity(quantized, options, progress)
        _check_finite(checkpoint, after)
        nbytes = checkpoint.nbytes, quantized.nbytes
    return QuantizeResult(
        Path(out), checkpoint.source, chosen.name, choice, nbytes,
        {name: (before[name], figure) for name, figure in after.items()}, windows.record if windows else None, files,
        command_seconds(), report["usage"]["peak_rss_bytes"], report["usage"]["peak_device_bytes"],
        [*_says(checkpoint, choice, job.dtype), *report["says"]],
    )  # fmt: skip


def _refuse_device(chosen: Scheme, device: str) -> None:
    """Say now that the worker cannot compute there: it takes CUDA or the CPU."""
    import torch

    if device.startswith("mps"):
        raise UsageError(f"--device {device}: quantization runs on CUDA or a CPU", hint="--device cpu")
    place = pick_device(device)
    chosen.refuse_device(torch.device("cpu") if place.type == "mps" else place)


def _windows(
    checkpoint: Checkpoint, scheme: Scheme, calibration: CalibrationText, trust_remote_code: bool, progress: Progress
) -> CalibrationSet | None:
    """The windows, drawn; None where the scheme needs none."""
    if not scheme.gptq:
        return None
    seq_len = calibration.seq_len or _window_length(checkpoint)
    # Rows that are drawn from are all needed where the procedure says which; else no more text than this.
    enough = max(_CALIBRATION_BYTES, 400 * calibration.samples * seq_len)
    limit = None if calibration.sampling == "published" else enough
    say_of_own_text(checkpoint, calibration.data, "the model can lose more on other text", progress)
    corpus = read_corpus(calibration.data, role="calibration", limit_bytes=limit, progress=progress)
    tokenizer = None if corpus.windows else load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
    windows = draw_windows(
        corpus, tokenizer, samples=calibration.samples, seq_len=seq_len, seed=calibration.seed,
        sampling=calibration.sampling, chat_template=calibration.chat_template, count_prompts=True,
    )  # fmt: skip
    check_windows(checkpoint, windows.windows)
    return windows if tokenizer is None else windows.read_by(checkpoint.tokenizer)


def _window_length(checkpoint: Checkpoint) -> int:
    return min(_PUBLISHED_WINDOW, checkpoint.positions or _PUBLISHED_WINDOW)


def _dtype(checkpoint: Checkpoint) -> str:
    """What the model is loaded in, and its dense tensors are stored in."""
    return "float16" if checkpoint.tensors[checkpoint.anatomy.embedding].dtype == "F16" else "bfloat16"


def _check_memory(checkpoint: Checkpoint, windows: CalibrationSet | None) -> None:
    """Refuse what would not fit: the weights in 16 bits, and the hidden states of all windows, twice."""
    width = checkpoint.tensors[checkpoint.anatomy.embedding].shape[1]
    states = 0 if windows is None else 2 * 2 * width * sum(map(len, windows.windows))
    needed, free = 2 * checkpoint.parameters() + states, available_bytes()
    if needed > free:
        raise ShortstackError(
            f"{checkpoint.source}: {size(needed)} of memory needed to quantize it ({size(states)} for the windows), "
            f"{size(free)} free",
            hint="use fewer --samples, or a shorter --seq-len",
        )


def _perplexity(checkpoint: Checkpoint, options: QuantizeOptions, progress: Progress) -> dict[str, Figure]:
    """Text -> perplexity, where some are to be measured."""
    if options.eval_data == "none":
        return {}
    how = EvaluationOptions(
        device=options.device, trust_remote_code=options.trust_remote_code, allow_links=options.allow_links,
        quiet=options.quiet,
    )  # fmt: skip
    subject = Subject(checkpoint, how, progress)
    length = min(_PPL_WINDOW, checkpoint.positions or _PPL_WINDOW)
    results = subject_ppl(subject, evaluation_texts(options.eval_data, None), Windows([length]))
    subject.release()
    for note in dict.fromkeys(note for result in results for note in result.notes if note.startswith("warning")):
        progress.say(note)
    return {str(result.data["source"]): result.figures[f"ppl_{length}"] for result in results}


def _check_finite(checkpoint: Checkpoint, figures: Mapping[str, Figure]) -> None:
    for name, figure in figures.items():
        if figure.value is None or figure.note:
            raise ShortstackError(
                f"{checkpoint.source}: its perplexity on {name} is not finite once it is quantized ({figure.note})",
                hint="use more --samples, or a scheme with more bits",
            )


def _step(checkpoint: Checkpoint, job: Job, choice: LayerChoice, windows: CalibrationSet | None) -> dict[str, Any]:
    """What shortstack.json says of it."""
    return {
        "stage": "quantize",
        "source": checkpoint.source,
        "fingerprint": checkpoint.fingerprint,
        "scheme": job.scheme,
        "method": "gptq" if job.gptq else "rounding",
        "groups": {str(size): list(kinds) for size, kinds in choice.groups.items()},
        "dense": choice.dense,
        "dtype": job.dtype,
        **({"actorder": job.actorder, "dampening": job.dampening} if job.gptq else {}),
        "calibration": windows.record if windows else None,
        "versions": versions("llmcompressor", "compressed-tensors"),
    }


def _says(checkpoint: Checkpoint, choice: LayerChoice, dtype: str) -> list[str]:
    stored = checkpoint.tensors[checkpoint.anatomy.embedding].dtype
    lines = [f"left dense: {kind} ({why})" for kind, why in choice.dense.items()]
    if stored not in ("BF16", "F16"):
        lines.append(f"what is left dense was {stored} and is stored in {dtype} now")
    return lines


def check_quantize(values: Mapping[str, Any]) -> list[str]:
    """Look at what would be read, before it runs; lines about what could not be looked at.

    Raises:
        ShortstackError: the model cannot be quantized so, or a text cannot be used.
    """
    chosen = scheme_named(values.get("scheme", "W4A16"))
    notes = []
    model: Forecast | None = values.get("model")
    if model is not None:
        chosen_layers(model.checkpoint, chosen, values.get("group_size"))
    if chosen.gptq:
        data = values.get("data", _CALIBRATION.data)
        notes += preview(data, "calibration", lambda: read_corpus(data, role="calibration", limit_bytes=READ_BYTES))
        if model is not None and values.get("seq_len"):
            model.check_positions("seq_len", values["seq_len"])
    if (text := values.get("eval_data", _OPTIONS.eval_data)) != "none":
        notes += check_texts({"data": text})
    return notes


def estimate_quantize(values: Mapping[str, Any]) -> Estimate:
    """The checkpoint that quantization makes."""
    model: Forecast | None = values.get("model")
    if model is None:
        return Estimate("checkpoint")
    chosen = scheme_named(values.get("scheme", "W4A16"))
    choice = chosen_layers(model.checkpoint, chosen, values.get("group_size"))
    gone = [t for place, block in enumerate(model.checkpoint.blocks) if place not in model.kept for t in block]
    whole = expected_nbytes(model.checkpoint, chosen, choice)
    nbytes = whole - expected_nbytes(replace(model.checkpoint, tensors={t.name: t for t in gone}), chosen, choice)
    return Estimate(f"{len(model.kept)} blocks in {chosen.name}", nbytes, forecast=model)
