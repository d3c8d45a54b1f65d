"""Generation health: what perplexity and multiple choice do not show. Repetition, drift, the end of texts, probes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shortstack.artifacts.results import Figure, Result, Results, mean_figure, perplexity_figure
from shortstack.errors import UsageError
from shortstack.evaluation.continuations import DECODINGS, Written, subject_texts
from shortstack.evaluation.evaluated_model import open_subjects
from shortstack.evaluation.judge import find_judge, judgement
from shortstack.evaluation.options import EvaluationOptions
from shortstack.evaluation.prompts import NEW_TOKENS, PROBES, GenerationRequest

_MEASURES = ("distinct_1", "distinct_2", "distinct_4", "longest_repeat", "loops", "ended", "length", "foreign")
_UNITS = {"longest_repeat": "tokens", "length": "tokens"}
_DEFAULTS = EvaluationOptions()


def evaluate_generation(
    *models: str,
    prompts: Path | None = None,
    new_tokens: int = NEW_TOKENS,
    probes: int = PROBES,
    dense: str | None = None,
    seed: int = 1234,
    out: Path | None = None,
    options: EvaluationOptions = _DEFAULTS,
) -> Results:
    """Health of what checkpoints write: repetition, end of text, foreign script, perplexity under the dense model.

    Every prompt is continued twice by every model: greedily, where repetition shows, and drawn (temperature 1, top-k 50,
    top-p 0.95), where drift shows. A draw depends on seed and prompt alone. Of each continuation: the share of different
    n-grams (`distinct_1`, `distinct_2`, `distinct_4`), the longest span that occurs twice (`longest_repeat`), whether it ends
    in a loop (`loops`), whether the text ended by itself (`ended`) and after how many tokens (`length`), the share of tokens
    outside the prompt's script (`foreign`), and its perplexity under the dense model (`ppl_by_dense`). The probes have one
    right answer: sums, and words to be copied.

    Args:
        models: checkpoint directories, hub ids such as `org/name@revision`, or `embedded`.
        prompts: a .txt file (a prompt a line) or rows of `text`; by default 41 of shortstack's own, in several registers.
        new_tokens: at most so many per continuation.
        probes: questions of each kind.
        dense: the model that judges the texts; by default the one that shortstack.json names, else the first of `models`.
        seed: of the draws and the probes, the same for every model.
        out: write the results here, the texts with them (results.json).
        options: how it is run.

    Returns:
        A result per checkpoint.

    Raises:
        ShortstackError: a checkpoint cannot be loaded, or no prompt fits.
    """
    if new_tokens < 1 or probes < 0:
        raise UsageError(f"--new-tokens {new_tokens} --probes {probes}: expected at least 1, and at least 0")
    subjects = open_subjects("generation", models, options, out)
    request = GenerationRequest.read(prompts, new_tokens, probes, seed)
    written = []
    for subject in subjects:
        written.append(subject_texts(subject, request))
        subject.release()
    found = Results(tuple(judged_results(written, request, dense, options)))
    if out is not None:
        found.save(out)
    return found


def judged_results(
    written: Sequence[Written], request: GenerationRequest, dense: str | None, options: EvaluationOptions
) -> list[Result]:
    """A result per model, its texts judged by the dense model, which is loaded when all others are gone."""
    judge, notes = find_judge(written, dense, options)
    results = [_result(one, request, judgement(judge, one), judge.name, notes) for one in written]
    judge.release()
    return results


def _result(
    one: Written, request: GenerationRequest, nll: dict[str, list[float | None]], judge: str, notes: Sequence[str]
) -> Result:
    figures: dict[str, Figure] = {}
    per_item: dict[str, list[Any]] = {"prompts": [row["prompt"] for row in one.found[DECODINGS[0]]]}
    for decoding in DECODINGS:
        rows = one.found[decoding]
        for measure in _MEASURES:
            name = f"{decoding} {measure}"
            per_item[name] = [float(row[measure]) for row in rows]
            figures[name] = mean_figure(per_item[name], _UNITS.get(measure, "share"))
        per_item[f"{decoding} ppl_by_dense"] = nll[decoding]
        figures[f"{decoding} ppl_by_dense"] = _judged_figure([value for value in nll[decoding] if value is not None])
        per_item[f"{decoding} texts"] = [row["text"] for row in rows]
    for kind in dict.fromkeys(probe.kind for probe in request.probes):
        per_item[kind] = [answer["right"] for answer in one.found["probes"] if answer["kind"] == kind]
        figures[kind] = mean_figure(per_item[kind], "accuracy")
    per_item["probes"] = one.found["probes"]
    return one.subject.result(
        "generation",
        one.usage,
        data={"source": request.source, "sha256": request.sha256, "rows": len(request.prompts)},
        settings={"new_tokens": request.new_tokens, "seed": request.seed, "dense": judge},
        figures=figures,
        per_item=per_item,
        notes=[*notes, *_left_out(one, request)],
    )


def _left_out(one: Written, request: GenerationRequest) -> list[str]:
    """What a model was not asked, because its tokenizer cannot write it or its positions cannot hold it."""
    name, notes = one.subject.name, []
    left_out, probes = one.found["left_out"], len(request.probes) - len(one.found["probes"])
    if left_out:
        registers = ", ".join(dict.fromkeys(request.prompts[number]["register"] for number in left_out))
        notes.append(
            f"{name}: {len(left_out)} of {len(request.prompts)} prompts left out, which its tokenizer cannot write or its "
            f"positions cannot hold ({registers})"
        )
    if probes:
        notes.append(f"{name}: {probes} of {len(request.probes)} probes left out, for the same reasons")
    return notes


def _judged_figure(nll: Sequence[float]) -> Figure:
    if not nll:
        return Figure(None, None, "ppl", 0, "nothing was written that the dense model can read")
    return perplexity_figure(nll, 1)
