"""The layout of the published evaluation: a folder per model with tables of perplexity and accuracy, and the samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shortstack.artifacts.csv_folder import file_name, model_folders, weights_mib, write_csv
from shortstack.artifacts.results import Result
from shortstack.evaluation.task_files import MEAN, TASKS
from shortstack.runtime.atomic_output import write_file

_PUBLISHED_WINDOW = 128  # tokens: tables of other windows name them


def write_published_csv(results: Sequence[Result], folder: Path) -> None:
    """Write MODEL/ppl.csv and ppl_bos.csv, zeroshot_acc.csv and gen_text.txt, for what was evaluated.

    A table of other windows than 128 tokens is named after them, such as ppl_2048.csv. A figure that is not there is an empty
    cell.
    """
    for model, name in model_folders([result.model for result in results]).items():
        own = [result for result in results if result.model == model]
        _write_ppl([result for result in own if result.what == "ppl"], folder / name)
        for result in own:
            if result.what == "zeroshot":
                write_csv(folder / name / "zeroshot_acc.csv", _accuracies(result))
            elif result.what == "samples":
                write_file(folder / name / "gen_text.txt", _samples(result).encode())


def _write_ppl(results: Sequence[Result], folder: Path) -> None:
    """A table for each length of windows and each measured BOS rule: a column per text, then parameters, MiB of weights."""
    lengths = dict.fromkeys(length for result in results for length in result.settings["seq_len"])
    for length in lengths:
        for rule, suffix in (("", ""), ("_bos_every", "_bos")):
            if not all(f"ppl_{length}{rule}" in result.figures for result in results):
                continue  # a rule that was not requested
            table = "ppl" if length == _PUBLISHED_WINDOW else f"ppl_{length}"
            header = [f"ppl_{file_name(str(result.data['source']))}" for result in results]
            values = [result.figures[f"ppl_{length}{rule}"].value for result in results]
            last = results[-1]
            row = [*("" if value is None else repr(value) for value in values), last.parameters, weights_mib(last)]
            write_csv(folder / f"{table}{suffix}.csv", [[*header, "params", "mem"], row])


def _accuracies(result: Result) -> list[list[Any]]:
    """A row of tasks, one of metrics, one of scores in percent; the mean comes last."""
    chosen: list[tuple[str, str, float | None]] = [
        (task, metric, figure.value)
        for name, figure in result.figures.items()
        for task, _, metric in [name.partition(" ")]
        if name != MEAN and metric == (TASKS[task].metric if task in TASKS else metric)
    ]
    if MEAN in result.figures:
        chosen.append((MEAN, "n/a", result.figures[MEAN].value))
    scores = ["" if value is None else repr(100 * value) for _, _, value in chosen]
    return [[task for task, _, _ in chosen], [metric for _, metric, _ in chosen], scores]


def _samples(result: Result) -> str:
    settings = result.settings
    lengths = f"leng gen {settings['new_tokens']} + input {settings['prompt_tokens']}"
    texts = [f"=== output {number} | {lengths}\n{text}\n" for number, text in enumerate(result.per_item["texts"])]
    return f"=== input ===\n{settings['prompt']}\n" + "".join(texts)
