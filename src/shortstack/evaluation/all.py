"""All evaluations of some checkpoints in one call: each model is loaded once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shortstack.artifacts.results import Results
from shortstack.common.options import stage
from shortstack.common.progress import Progress
from shortstack.data.ppl_datasets import evaluation_texts
from shortstack.evaluation.evaluated_model import open_subjects, written
from shortstack.evaluation.generation import judged_results
from shortstack.evaluation.options import EvaluationOptions, GenerationOptions, TaskOptions, TextOptions
from shortstack.evaluation.ppl import Windows, check_texts, subject_ppl
from shortstack.evaluation.prompts import GenerationRequest
from shortstack.evaluation.samples import SampleRequest, subject_samples
from shortstack.evaluation.zeroshot import check_tasks, open_tasks, subject_zeroshot

_TEXTS, _TASKS, _DEFAULTS = TextOptions(data="wikitext2,ptb"), TaskOptions(), EvaluationOptions()
_WRITTEN = GenerationOptions()


@stage
def evaluate_all(
    *models: str,
    texts: TextOptions = _TEXTS,
    chosen: TaskOptions = _TASKS,
    limit: int | None = None,
    written_texts: GenerationOptions = _WRITTEN,
    out: Path | None = None,
    csv: Path | None = None,
    options: EvaluationOptions = _DEFAULTS,
) -> Results:
    """Measure perplexity, zero-shot accuracy and generation quality of checkpoints, with samples, into one file.

    Args:
        models: The checkpoints, the dense one first: directories, hub ids such as `org/name@revision`, or `embedded`.
        texts: what perplexity is measured on.
        chosen: the zero-shot tasks.
        limit: Use only the first rows of each task and the first windows of each text, this many.
        written_texts: what the models write, and who judges it.
        out: Write the results to this file (results.json).
        csv: Write the published files into this folder, as `shortstack eval ppl`, `shortstack eval zeroshot` and
            `shortstack eval samples` do.
        options: how it is run.

    Returns:
        The results of every checkpoint.

    Raises:
        ShortstackError: a checkpoint, a text or a task's rows cannot be used.
    """
    from shortstack.evaluation.generate import subject_texts

    subjects = open_subjects("all", models, options, out, csv)
    windows, corpora = Windows.read(texts, limit), evaluation_texts(texts.data, texts.data_dir, subjects[0].progress)
    plan = open_tasks(chosen, limit, None, Progress(quiet=options.quiet))
    generation, samples = GenerationRequest.read(None, seed=written_texts.seed), SampleRequest(seed=written_texts.seed)
    results, texts_of = [], []
    for subject in subjects:
        results += subject_ppl(subject, corpora, windows)
        results.append(subject_zeroshot(subject, plan))
        texts_of.append(subject_texts(subject, generation))
        results.append(subject_samples(subject, samples))
        subject.release()
    return written(Results((*results, *judged_results(texts_of, generation, written_texts.dense, options))), out, csv)


def check_all(values: Mapping[str, Any]) -> list[str]:
    """Look at texts and tasks, before anything runs; lines about what could not be looked at.

    Raises:
        ShortstackError: one cannot be used.
    """
    return [*check_texts({"data": _TEXTS.data, **values}), *check_tasks(values)]
