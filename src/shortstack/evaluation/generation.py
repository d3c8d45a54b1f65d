"""Generation quality: what perplexity and multiple choice do not show. Repetition, drift, the end of texts, probes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.artifacts.results import Figure, Result, Results, mean_figure, perplexity_figure
from shortstack.artifacts.units import tokens_hash
from shortstack.common.json_text import json_text
from shortstack.common.options import stage
from shortstack.data.tokenizer import open_ids
from shortstack.errors import UsageError
from shortstack.evaluation.evaluated_model import Subject, open_subjects, written
from shortstack.evaluation.options import EvaluationOptions
from shortstack.evaluation.prompts import DECODINGS, NEW_TOKENS, PROBES, GenerationRequest
from shortstack.families.open_model import dense_of, open_model

if TYPE_CHECKING:
    from shortstack.evaluation.generate import Written


_MEASURES = ("distinct_1", "distinct_2", "distinct_4", "longest_repeat", "loops", "ended", "length", "foreign")
_UNITS = {"longest_repeat": "tokens", "length": "tokens"}
_DEFAULTS = EvaluationOptions()


@stage
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
    """Measure the quality of generated text: repetition, end of text, foreign script, perplexity under the dense model.

    Every model continues every prompt twice: greedily, which shows repetition, and by sampling (temperature 1, top-k
    50, top-p 0.95), which shows drift. A sample depends only on seed and prompt. The figures of a continuation are the
    share of distinct n-grams (`distinct_1`, `distinct_2`, `distinct_4`), the longest span that occurs twice
    (`longest_repeat`), whether it ends in a loop (`loops`), whether the text ended by itself (`ended`) and after how
    many tokens (`length`), the share of tokens outside the prompt's script (`foreign`), and its perplexity under the
    dense model (`ppl_by_dense`). Probes have one right answer: sums, and words to copy.

    Args:
        models: The checkpoints: directories, hub ids such as `org/name@revision`, or `embedded`.
        prompts: The prompts: a .txt file with one on each line, or rows of `text`. By default they are the 41 prompts
            in the package, in several registers.
        new_tokens: The largest number of tokens in a continuation.
        probes: The number of probes of each kind.
        dense: The model whose perplexity judges the texts. By default it is the dense model that shortstack.json names,
            or else the first checkpoint.
        seed: The seed of the samples and the probes, the same for every model.
        out: Write the results with the texts to this file (results.json).
        options: how it is run.

    Returns:
        One result for each checkpoint.

    Raises:
        ShortstackError: a checkpoint cannot be loaded, or no prompt fits.
    """
    from shortstack.evaluation.generate import subject_texts

    if new_tokens < 1 or probes < 0:
        raise UsageError(f"--new-tokens {new_tokens} --probes {probes}: expected at least 1, and at least 0")
    subjects = open_subjects("generation", models, options, out)
    request = GenerationRequest.read(prompts, new_tokens, probes, seed)
    texts = []
    for subject in subjects:
        texts.append(subject_texts(subject, request))
        subject.release()
    return written(Results(tuple(judged_results(texts, request, dense, options))), out, None)


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
        read = [value for value in nll[decoding] if value is not None]
        nothing = Figure(None, None, "ppl", 0, "no text was generated that the dense model can read")
        figures[f"{decoding} ppl_by_dense"] = perplexity_figure(read, 1) if read else nothing
        per_item[f"{decoding} texts"] = [row["text"] for row in rows]
    for kind in dict.fromkeys(probe.kind for probe in request.probes):
        per_item[kind] = [answer["right"] for answer in one.found["probes"] if answer["kind"] == kind]
        figures[kind] = mean_figure(per_item[kind], "accuracy")
    per_item["probes"] = one.found["probes"]
    return one.subject.result(
        "generation",
        one.usage,
        data={"source": request.source, "sha256": request.sha256, "rows": len(request.prompts)},
        settings={
            "new_tokens": request.new_tokens,
            "seed": request.seed,
            "dense": judge,
            "tokenizer": _split_of_prompts(one.subject, request),
        },
        figures=figures,
        per_item=per_item,
        notes=[*notes, *_left_out(one, request)],
    )


def _split_of_prompts(subject: Subject, request: GenerationRequest) -> str:
    """What the tokenizer makes of the prompts, as a hash: the measures count its tokens."""
    return tokens_hash(subject.tokenizer(row["text"], verbose=False)["input_ids"] for row in request.prompts)


def _left_out(one: Written, request: GenerationRequest) -> list[str]:
    """What a model was not asked, because its tokenizer cannot write it or its positions cannot hold it."""
    name, notes = one.subject.name, []
    left_out, probes = one.found["left_out"], len(request.probes) - len(one.found["probes"])
    if left_out:
        registers = ", ".join(dict.fromkeys(request.prompts[number]["register"] for number in left_out))
        notes.append(
            f"{name}: {len(left_out)} of {len(request.prompts)} prompts skipped, because its tokenizer cannot encode them or "
            f"they need too many positions ({registers})"
        )
    if probes:
        notes.append(f"{name}: {probes} of {len(request.probes)} probes skipped, for the same reasons")
    return notes


def find_judge(written: Sequence[Written], dense: str | None, options: EvaluationOptions) -> tuple[Subject, list[str]]:
    """(the dense model, what a reader should know): the requested one, the models' own, or the first.

    Raises:
        ShortstackError: the requested one cannot be opened.
    """
    first = written[0].subject
    if dense is not None:
        judge = open_model(dense, allow_links=options.allow_links, progress=first.progress)
        return Subject(judge, options, first.progress), []
    for one in written:
        checkpoint, note = dense_of(one.subject.checkpoint, None, first.progress)
        if checkpoint is not None:
            return Subject(checkpoint, options, first.progress), []
        if note:
            return first, [f"{note}; the texts are judged by {first.name}"]
    return first, []


def judgement(judge: Subject, one: Written) -> dict[str, list[float | None]]:
    """Per decoding, the mean NLL per token of each text under the judge, in nats; None where it cannot read the text."""
    alike = judge.tokenizer.get_vocab() == one.subject.tokenizer.get_vocab()
    asked = {
        name: [
            (row["prompt_ids"], row["ids"]) if alike else _as_judge_reads(judge, one, row) for row in one.found[name]
        ]
        for name in DECODINGS
    }
    digest = hashlib.sha256(json_text(asked).encode()).hexdigest()
    key = {"what": "judgement", "texts": digest}
    what = f"perplexity of what {one.subject.name} wrote"
    found, _ = judge.found(what, key, lambda: {name: _nll(judge, requests) for name, requests in asked.items()})
    return found


def _nll(judge: Subject, requests: Sequence[tuple[list[int], list[int]]]) -> list[float | None]:
    from shortstack.evaluation.logprobs import continuation_logprobs

    read = [bool(context and said) and max(*context, *said) < judge.rows for context, said in requests]
    asked = [request for request, is_read in zip(requests, read, strict=True) if is_read]
    sums = iter(continuation_logprobs(judge.model, asked, max_length=judge.checkpoint.positions, device=judge.place))
    return [-next(sums)[0] / len(said) if is_read else None for (_, said), is_read in zip(requests, read, strict=True)]


def _as_judge_reads(judge: Subject, one: Written, row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """(context, continuation) in the tokens of a judge of another vocabulary."""
    prompt = one.subject.tokenizer.decode(row["prompt_ids"], skip_special_tokens=True)
    context, whole = open_ids(judge.tokenizer, prompt), open_ids(judge.tokenizer, row["text"])
    return context, whole[len(context) :]
