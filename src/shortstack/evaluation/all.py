"""All evaluations of some checkpoints in one call: each model is loaded once."""

from __future__ import annotations

from pathlib import Path

from shortstack.artifacts.results import Results
from shortstack.common.extras import need_extra
from shortstack.common.progress import Progress
from shortstack.data.ppl_datasets import evaluation_texts
from shortstack.evaluation.evaluated_model import open_subjects
from shortstack.evaluation.generation import judged_results
from shortstack.evaluation.options import EvaluationOptions
from shortstack.evaluation.ppl import parse_lengths, subject_ppl
from shortstack.evaluation.prompts import GenerationRequest
from shortstack.evaluation.samples import SampleRequest, subject_samples
from shortstack.evaluation.zeroshot import open_tasks, subject_zeroshot

_DEFAULTS = EvaluationOptions()


def evaluate_all(
    *models: str,
    data: str = "wikitext2,ptb",
    data_dir: Path | None = None,
    seq_len: str | None = None,
    tasks: str | None = None,
    tasks_dir: Path | None = None,
    limit: int | None = None,
    dense: str | None = None,
    seed: int = 1234,
    out: Path | None = None,
    options: EvaluationOptions = _DEFAULTS,
) -> Results:
    """Perplexity, zero-shot accuracy, generation health and samples of checkpoints, in one file.

    Args:
        models: checkpoint directories, hub ids such as `org/name@revision`, or `embedded`; the dense one first.
        data: texts for perplexity, as of `eval ppl`.
        data_dir: a folder with local copies of the published texts.
        seq_len: window lengths, as of `eval ppl`.
        tasks: as of `eval zeroshot`.
        tasks_dir: a folder with each task's own files.
        limit: the first so many rows of each task.
        dense: the model that judges what the others write, as of `eval generation`.
        seed: of draws and probes.
        out: write the results here (results.json).
        options: how it is run.

    Returns:
        The results of every checkpoint.

    Raises:
        ShortstackError: a checkpoint, a text or a task's rows cannot be used.
    """
    from shortstack.evaluation.generate import subject_texts

    need_extra("eval all")
    subjects = open_subjects("all", models, options, out)
    lengths, texts = parse_lengths(seq_len), evaluation_texts(data, data_dir)
    plan = open_tasks(tasks, tasks_dir, limit, None, Progress(quiet=options.quiet))
    generation, samples = GenerationRequest.read(None, seed=seed), SampleRequest(seed=seed)
    results, written = [], []
    for subject in subjects:
        results += subject_ppl(subject, texts, lengths)
        results.append(subject_zeroshot(subject, plan))
        written.append(subject_texts(subject, generation))
        results.append(subject_samples(subject, samples))
        subject.release()
    found = Results((*results, *judged_results(written, generation, dense, options)))
    if out is not None:
        found.save(out)
    return found
