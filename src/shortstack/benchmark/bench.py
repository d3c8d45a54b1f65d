"""Measure checkpoints at work: latency, throughput, memory, utilisation, in the engines that people use."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.artifacts.csv_folder import check_csv_folder
from shortstack.artifacts.results import Results
from shortstack.benchmark.options import EngineOptions, MeasuringOptions, Sweep, SweepOptions
from shortstack.checkpoint.forecast import Estimate, Forecast
from shortstack.common.clock import command_seconds
from shortstack.common.extras import need_packages
from shortstack.common.option_values import Listed
from shortstack.common.options import Options, records_of, refuse_idle, stage
from shortstack.common.progress import Progress
from shortstack.errors import ShortstackError, UsageError
from shortstack.runtime.atomic_output import check_writable_file

if TYPE_CHECKING:
    from shortstack.benchmark.engines import Workload
    from shortstack.benchmark.sweep import Measured
    from shortstack.evaluation.evaluated_model import Subject

_ENGINE = "transformers"
_OWN = ("transformers", "compiled")  # engines that are part of this environment
_SWEEP, _ENGINES, _MEASURING = SweepOptions(), EngineOptions(), MeasuringOptions()


@dataclasses.dataclass(frozen=True)
class ReportOptions(Options):
    """What is made from the figures.

    Attributes:
        compare: Show the speed-up of each model over the first one, beside the ideal speed-up, which follows from the
            remaining work of blocks, head and cache.
        draft: Measure speculative decoding of the one MODEL with this pruned model as the draft, instead of the sweep.
        draft_tokens: The number of tokens that the draft generates at a time.
        csv: Write the published CSV files into this folder: latency_throughput.csv, memory_tracemalloc.csv and
            nvidia_smi_gpuutil.csv for each model and configuration.
        plot: Draw latency and memory against the batch size, and speed-up against removed blocks, as PNG files in this
            folder.
    """

    compare: bool = False
    draft: str | None = None
    draft_tokens: int = 5
    csv: Path | None = None
    plot: Path | None = None


_REPORT = ReportOptions()


@stage
def bench(
    *models: str,
    sweep: SweepOptions = _SWEEP,
    engine: Listed = _ENGINE,
    engines: EngineOptions = _ENGINES,
    report: ReportOptions = _REPORT,
    out: Path | None = None,
    options: MeasuringOptions = _MEASURING,
) -> Results:
    """Measure latency, throughput, memory and utilisation of checkpoints, in the engines that people use.

    For every configuration the output has latency, time to the first token (prefill), time per further token (decoding)
    and throughput, as medians with percentiles. Peak memory and utilisation are measured in a separate process. Each
    figure is shown beside the limit that memory bandwidth and matrix products, measured in the same run, allow. Several
    models take turns (A B, B A), so that differences are paired.

    Source of --draft: speculative decoding (Leviathan et al. 2023, arXiv 2211.17192).

    Args:
        models: The checkpoints, the dense one first: directories, hub ids such as `org/name@revision`, or `embedded`.
        sweep: what is run.
        engine: The engines, separated by commas: `transformers` (eager), `compiled` (transformers with torch.compile
            and a static cache), `vllm`, `llama.cpp`. Each has its own table.
        engines: where they are.
        report: what is made of the figures.
        out: Write the results to this file (results.json).
        options: how it is measured.

    Returns:
        One result for each checkpoint, engine and configuration.

    Raises:
        ShortstackError: a checkpoint cannot be loaded, an engine is not there or fails, or nothing fits.
    """
    from shortstack.benchmark.engines import measured_engines

    chosen, names = Sweep.of(sweep), measured_engines(engine)
    if report.draft is not None:
        need_one_model(models, engine, report.draft_tokens)
    refuse_without_effect(models, names, sweep, engines, report)
    _check_outputs(report, out)
    subjects = _opened(models, options)
    if report.draft is not None:
        return _drafted(subjects[0], report, chosen, options, out)
    return _swept(subjects, report, engines, chosen, names, out, options=options)


def need_one_model(models: Sequence[Any], engine: str, draft_tokens: int) -> None:
    """What `--draft` needs.

    Raises:
        UsageError: several models, another engine, or nothing to draft.
    """
    if len(models) != 1:
        raise UsageError(f"--draft: expected one MODEL, the dense one, found {len(models)}")
    if engine != "transformers":
        raise UsageError(f"--draft with --engine {engine}: drafts are run by transformers", hint="leave --engine out")
    if draft_tokens < 1:
        raise UsageError(f"--draft-tokens {draft_tokens}: expected at least 1")


def refuse_without_effect(
    models: Sequence[Any], names: Sequence[str], sweep: SweepOptions, engines: EngineOptions, report: ReportOptions
) -> None:
    """Refuse options that nothing would come of.

    Raises:
        UsageError: there is one.
    """
    if not set(names) - set(_OWN):
        refuse_idle(engines, (one.name for one in dataclasses.fields(engines)), f"with --engine {','.join(names)}")
    if report.draft is None:
        refuse_idle(report, ["draft_tokens"], "without --draft")
        if report.compare and len(models) == 1:
            raise UsageError("--compare: there is one model", hint="name the dense model first, then the others")
        return
    refuse_idle(report, ["compare", "csv", "plot"], "with --draft")
    why = "with --draft, which has its own prompts and generates one text at a time, greedily"
    refuse_idle(sweep, ["preset", "batch", "prompt_tokens", "sampling"], why)
    if sweep.new_tokens is not None and "," in sweep.new_tokens:
        raise UsageError(f"--new-tokens {sweep.new_tokens}: expected one number, with --draft", hint="--new-tokens 64")


def _check_outputs(report: ReportOptions, out: Path | None) -> None:
    if out is not None:
        check_writable_file(Path(out))
    check_csv_folder(report.csv)
    if report.plot is not None:
        check_writable_file(Path(report.plot) / "file")
        need_packages("--plot", "matplotlib", extra="report")


def _opened(models: Sequence[str], options: MeasuringOptions) -> list[Subject]:
    from shortstack.evaluation.evaluated_model import open_subject
    from shortstack.evaluation.options import EvaluationOptions

    if not models:
        raise UsageError("no model given", hint="shortstack bench MODEL...")
    if len(set(models)) < len(models):
        raise UsageError("a model is given twice: expected each once")
    progress = Progress(quiet=options.quiet)
    how = EvaluationOptions(
        dtype=options.dtype, device=options.device, fresh=options.fresh, trust_remote_code=options.trust_remote_code,
        allow_links=options.allow_links, quiet=options.quiet, tokenizer=options.tokenizer,
    )  # fmt: skip
    return [open_subject(model, how, progress) for model in models]


def _drafted(
    dense: Subject, report: ReportOptions, sweep: Sweep, options: MeasuringOptions, out: Path | None
) -> Results:
    from shortstack.benchmark.draft import draft_result, is_exact
    from shortstack.benchmark.report import BenchResults

    assert report.draft is not None
    (draft,) = _opened([report.draft], options)
    result = draft_result(dense, draft, sweep, report.draft_tokens, options.seed)
    found = BenchResults((result,), exit_code=0 if is_exact(result) else 1).in_time(command_seconds())
    if out is not None:
        found.save(out)
    return found


def _swept(
    subjects: Sequence[Subject],
    report: ReportOptions,
    engines: EngineOptions,
    sweep: Sweep,
    names: Sequence[str],
    out: Path | None,
    *,
    options: MeasuringOptions,
) -> Results:
    from shortstack.benchmark.engines import EngineError
    from shortstack.benchmark.report import BenchResults, result_of, with_speedups
    from shortstack.benchmark.sweep import SweepRun

    workloads = [_workloads(subject, sweep, options.seed) for subject in subjects]
    run = SweepRun(subjects, workloads, sweep, engines)
    measured: list[Measured] = []
    failed: list[str] = []
    for name in names:
        try:
            measured += run.measured(name, memory=options.memory)
        except EngineError as error:
            if len(names) == 1:
                raise
            failed.append(f"{name} was skipped: {error.message}")
    if not any(one.samples for one in measured):
        why = failed[0] if not measured else f"no configuration fits: {measured[0].does_not_fit}"
        raise ShortstackError(why, hint="use a smaller --batch or fewer --new-tokens" if measured else "")
    results = [result_of(one, sweep) for one in measured]
    if report.compare:
        results = with_speedups(results, measured)
    notes = [*_tokenizer_notes(subjects), *failed]
    results[0] = dataclasses.replace(results[0], notes=[*notes, *results[0].notes])
    found = BenchResults(tuple(results), exit_code=1 if failed else 0).in_time(command_seconds())
    _write(found, report, out)
    run.forget()
    return found


def _write(found: Results, report: ReportOptions, out: Path | None) -> None:
    if out is not None:
        found.save(out)
    if report.csv is not None:
        from shortstack.benchmark.csv_files import write_published_csv

        write_published_csv(found.results, Path(report.csv))
    if report.plot is not None:
        from shortstack.benchmark.plots import write_plots

        write_plots(found.results, Path(report.plot))


def _workloads(subject: Subject, sweep: Sweep, seed: int) -> list[Workload]:
    """The configurations, in rising order of what they need."""
    from shortstack.benchmark.engines import Workload
    from shortstack.evaluation.samples import PUBLISHED_PROMPT

    if sweep.prompt_tokens is None:
        ids = [int(token) for token in subject.tokenizer(PUBLISHED_PROMPT)["input_ids"]]
        prompt = "the published prompt"
    else:
        ids, prompt = _ids_of_length(subject, sweep.prompt_tokens), f"a prompt of {sweep.prompt_tokens} tokens"
    check_positions(Forecast.of(subject.checkpoint), len(ids), sweep)
    return [
        Workload(batch, tuple(ids), new_tokens, sweep.sampling, seed, prompt)
        for new_tokens in sorted(sweep.new_tokens)
        for batch in sorted(sweep.batches)
    ]


def _ids_of_length(subject: Subject, length: int) -> list[int]:
    """So many tokens of English text; of a model without a tokenizer, so many different ones."""
    from shortstack.data.embedded import heldout_documents

    try:
        tokenizer = subject.tokenizer
    except ShortstackError as error:
        subject.progress.say(f"{error.message}; the prompt is the token ids 0, 1, 2, ... instead of text")
        return [at % subject.rows for at in range(length)]
    ids: list[int] = []
    for document in itertools.cycle(heldout_documents()):  # a long prompt is the text again and again
        ids += tokenizer(document.text, add_special_tokens=not ids, verbose=False)["input_ids"]
        if len(ids) >= length:
            break
    return [int(token) for token in ids[:length]]


def check_positions(model: Forecast, prompt_tokens: int, sweep: Sweep) -> None:
    """Refuse runs that are longer than a model can take.

    Raises:
        ShortstackError: they are.
    """
    too_long = model.checkpoint.too_long(prompt_tokens, max(sweep.new_tokens))
    if too_long:
        raise ShortstackError(too_long, hint="use fewer --new-tokens or --prompt-tokens")


def _tokenizer_notes(subjects: Sequence[Subject]) -> list[str]:
    """Models that read text otherwise do not do the same work on the same text."""
    vocabularies = []
    for subject in subjects:
        try:
            vocabularies.append(subject.tokenizer.get_vocab())
        except ShortstackError:
            return []
    other = [one.name for one, known in zip(subjects, vocabularies, strict=True) if known != vocabularies[0]]
    if not other:
        return []
    return [
        f"{', '.join(other)}: the tokenizer is not that of {subjects[0].name}, so tokens and tokens/s cannot be compared"
    ]


def check_bench(values: Mapping[str, Any]) -> list[str]:
    """Look at what a sweep needs before anything runs.

    Raises:
        ShortstackError: it would fail.
    """
    from shortstack.benchmark.engines import measured_engines

    sweep = _sweep_of(values)
    names = measured_engines(str(values.get("engine", _ENGINE)))
    models: list[Forecast | None] = values.get("models") or []
    if values.get("draft") is not None:
        need_one_model(models, values.get("engine", _ENGINE), values.get("draft_tokens", _REPORT.draft_tokens))
    given = {name: value for name, value in values.items() if name != "models"}
    records = records_of(bench, given | ({"draft": str(given["draft"])} if given.get("draft") is not None else {}))
    refuse_without_effect(models, names, records["sweep"], records["engines"], records["report"])
    if values.get("plot") is not None:
        need_packages("plot", "matplotlib", extra="report")
    for model in models:
        if model is not None:
            check_positions(model, sweep.prompt_tokens or 1, sweep)
    return []


def estimate_bench(values: Mapping[str, Any]) -> Estimate:
    """What a sweep leaves: figures of how many configurations."""
    sweep = _sweep_of(values)
    if values.get("draft") is not None:
        return Estimate("figures of drafting")
    engines = len(str(values.get("engine", _ENGINE)).split(","))
    configurations = len(sweep.batches) * len(sweep.new_tokens) * engines
    models = len(values.get("models") or [])
    return Estimate(f"figures of {models} model{'s' if models != 1 else ''} x {configurations} configurations")


def _sweep_of(values: Mapping[str, Any]) -> Sweep:
    names = {field.name for field in dataclasses.fields(SweepOptions)}
    return Sweep.of(SweepOptions(**{name: value for name, value in values.items() if name in names}))
