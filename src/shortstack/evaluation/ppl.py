"""Perplexity, exactly as published: rows joined by blank lines, windows side by side, either BOS rule.

Legend: W windows, T tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from shortstack.artifacts.results import Figure, Result, Results, perplexity_figure
from shortstack.artifacts.units import tokens_hash
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.json_fields import nested
from shortstack.common.options import stage
from shortstack.common.progress import Progress
from shortstack.data.calibration import check_windows
from shortstack.data.marks import marked_windows
from shortstack.data.ppl_datasets import LOCAL_COPIES, evaluation_texts, text_names
from shortstack.data.preview import preview
from shortstack.data.sources import Corpus
from shortstack.errors import ShortstackError, UsageError
from shortstack.evaluation.evaluated_model import Subject, evaluated, open_subjects
from shortstack.evaluation.options import BosRule, EvaluationOptions, TextOptions
from shortstack.runtime.devices import exact_place
from shortstack.runtime.memory import Usage

if TYPE_CHECKING:
    import torch

DEFAULT_SEQ_LENS = (128, 2048)
# Logits held at once, float32: on a CPU what its caches still help with, but enough tokens for the matrix products.
_LOGITS_BYTES = {"cpu": 32 << 20, "cuda": 128 << 20}
_FEWEST_TOKENS, _MOST_TOKENS = 1024, 8192  # at a time
_TEXTS, _DEFAULTS = TextOptions(), EvaluationOptions()
# BOS rule -> what stands behind a figure's name.
BOS_SUFFIXES = {"first": "", "every": "_bos_every"}


@dataclass(frozen=True)
class Windows:
    """The windows that texts are cut into.

    Attributes:
        lengths: in tokens; None: 128, and 2048 where the model has as many positions.
        bos: where BOS goes.
        limit: the first so many windows of each length; None: all.
    """

    lengths: Sequence[int] | None = None
    bos: BosRule = "first"
    limit: int | None = None

    @classmethod
    def read(cls, texts: TextOptions, limit: int | None = None) -> Windows:
        """What options say.

        Raises:
            UsageError: one of them means nothing.
        """
        if limit is not None and limit < 1:
            raise UsageError(f"--limit {limit}: expected at least 1 window", hint="--limit 100")
        return cls(parse_lengths(texts.seq_len), texts.bos, limit)

    def lengths_for(self, checkpoint: Checkpoint) -> list[int]:
        """The lengths, with those of the default that the model has positions for."""
        positions = checkpoint.positions
        return list(self.lengths or [n for n in DEFAULT_SEQ_LENS if n == DEFAULT_SEQ_LENS[0] or (positions or n) >= n])

    @property
    def rules(self) -> list[str]:
        """The BOS rules that are measured."""
        return list(BOS_SUFFIXES) if self.bos == "both" else [self.bos]


_ALL = Windows()


@stage
def evaluate_ppl(
    *models: str,
    texts: TextOptions = _TEXTS,
    limit: int | None = None,
    out: Path | None = None,
    csv: Path | None = None,
    options: EvaluationOptions = _DEFAULTS,
) -> Results:
    """Measure the perplexity of checkpoints on texts, with standard errors. Lower is better.

    Rows are joined by blank lines, tokenized without special tokens, and cut into consecutive windows (the rest is
    dropped). There is a figure for each length L and BOS rule: `ppl_L` has BOS once in front of the text (the published
    rule and the default), `ppl_L_bos_every` has BOS in front of every window.

    Args:
        models: The checkpoints: directories, hub ids such as `org/name@revision`, or `embedded`.
        texts: what it is measured on.
        limit: Use only the first windows of each text, this many. Figures with different limits are not compared.
        out: Write the results to this file (results.json).
        csv: Write the published CSV files into this folder: ppl.csv and ppl_bos.csv for each model, with a column for
            each text, the number of parameters, and the MiB of the weights.
        options: how it is run.

    Returns:
        One result for each checkpoint and text.

    Raises:
        ShortstackError: a checkpoint or text cannot be read, or is too short for one window.
    """
    windows = Windows.read(texts, limit)
    subjects = open_subjects("ppl", models, options, out, csv)
    corpora = evaluation_texts(texts.data, texts.data_dir, subjects[0].progress)
    return evaluated(subjects, lambda subject: subject_ppl(subject, corpora, windows), out, csv)


def subject_ppl(subject: Subject, texts: Sequence[Corpus], windows: Windows = _ALL) -> list[Result]:
    """A result per text, of one checkpoint."""
    chosen = windows.lengths_for(subject.checkpoint)
    results = []
    for corpus in texts:
        of_both = {
            "what": "ppl",
            "source": corpus.source,  # notes name it
            "data": corpus.sha256,
            "rows": corpus.rows,
            "lengths": chosen,
            "batch": subject.options.batch,
            **({} if windows.limit is None else {"limit": windows.limit}),
        }
        key = of_both if windows.bos == "both" else {**of_both, "bos": windows.bos}
        measure = functools.partial(_measured, subject, corpus, chosen, windows)
        found, usage = subject.found(f"ppl on {corpus.source}", key, measure, or_of=of_both)
        results.append(_result(subject, corpus, chosen, windows, found, usage))
    return results


def _result(
    subject: Subject, corpus: Corpus, lengths: Sequence[int], requested: Windows, found: Mapping[str, Any], usage: Usage
) -> Result:
    """The record of what was requested, of a finding that may hold the other BOS rule besides."""
    names = [f"ppl_{length}{BOS_SUFFIXES[rule]}" for length in lengths for rule in requested.rules]
    figures = {name: Figure.from_json(found["figures"][name]) for name in names}
    per_item = {name: found["per_item"][name] for name in names if name in found["per_item"]}
    all_windows = found.get("windows", {})  # earlier versions always measured all of them
    used = {name: {"used": len(nll), "of": all_windows.get(name, len(nll))} for name, nll in per_item.items()}
    is_cut = any(one["used"] < one["of"] for one in used.values())
    # Earlier versions kept the lines about missing figures, too.
    overlaps = [note for note in found["notes"] if " is not there: " not in note]
    return subject.result(
        "ppl",
        usage,
        data={**corpus.described(), "windows": used},
        settings={
            "joined_by": "\n\n", "seq_len": list(lengths), "limit": requested.limit if is_cut else None, **found["unit"],
        },
        figures=figures,
        per_item=per_item,
        notes=[*_limit_notes(used), *_missing_notes(subject.name, figures), *overlaps],
    )  # fmt: skip


def _limit_notes(used: Mapping[str, Mapping[str, int]]) -> list[str]:
    """How much of a text was measured, where a limit cut it."""
    return [
        f"{name} is over the first {one['used']} of {one['of']} windows (--limit)"
        for name, one in used.items()
        if one["used"] < one["of"]
    ]


def _missing_notes(source: str, figures: Mapping[str, Figure]) -> list[str]:
    return [f"{source}: {name} is not there: {figure.note}" for name, figure in figures.items() if figure.value is None]


def _measured(subject: Subject, corpus: Corpus, lengths: Sequence[int], requested: Windows) -> dict[str, Any]:
    """Figures, per-window values and notes of one text."""
    checkpoint, tokenizer = subject.checkpoint, subject.tokenizer
    if not corpus.documents:
        raise ShortstackError(f"{corpus.source}: perplexity needs text, these are rows of another kind")
    ids = list(tokenizer("\n\n".join(corpus.documents), add_special_tokens=False, verbose=False)["input_ids"])
    figures: dict[str, Any] = {}
    per_item: dict[str, list[float]] = {}
    numbers: dict[str, int] = {}
    for length in lengths:
        for rule in requested.rules:
            name = f"ppl_{length}{BOS_SUFFIXES[rule]}"
            bos_every = rule == "every"
            windows, reason = _windows_or_reason(ids, tokenizer.bos_token_id, length, bos_every, checkpoint.positions)
            if reason:
                figures[name] = Figure(None, None, "ppl", 0, reason).to_json()
                continue
            if not windows:
                raise ShortstackError(
                    f"{corpus.source}: a window of {length} tokens needs {length} tokens, found {len(ids)}",
                    hint="give more text, or a smaller --seq-len",
                )
            numbers[name] = len(windows)
            nll_W = window_nll(
                subject.model, windows[: requested.limit], checkpoint, batch=subject.options.batch, device=subject.place,
                progress=subject.progress,
            )  # fmt: skip
            figures[name] = perplexity_figure(nll_W, len(windows[0]) - 1).to_json()
            per_item[name] = nll_W
    # What these perplexities are per: tokens of this tokenizer, behind this BOS.
    unit = {"tokenizer": tokens_hash([ids]), "bos_token": tokenizer.bos_token_id}
    notes = _overlaps(checkpoint, corpus, ids)
    return {"figures": figures, "per_item": per_item, "windows": numbers, "notes": notes, "unit": unit}


def cut_windows(ids: Sequence[int], bos: int | None, seq_len: int, *, bos_every: bool) -> list[list[int]]:
    """The published windows of a tokenized text: BOS once in front, then cuts of `seq_len`; the tail is dropped.

    With `bos_every` each window has BOS in front of it besides, and so is one token longer.
    """
    stream = [bos, *ids] if bos is not None and not bos_every else list(ids)
    windows = [stream[start : start + seq_len] for start in range(0, len(stream) - seq_len + 1, seq_len)]
    return [[bos, *window] for window in windows] if bos is not None and bos_every else windows


def window_nll(
    model: Any,
    windows: Sequence[Sequence[int]],
    checkpoint: Checkpoint,
    *,
    batch: int | Literal["auto"] = "auto",
    device: torch.device,
    progress: Progress | None = None,
) -> list[float]:
    """Mean NLL per predicted token (all but the first) of each window, in nats.

    Raises:
        ShortstackError: a token id has no embedding, or an NLL is not finite.
    """
    import torch

    from shortstack.data.collators import Batch, window_batches
    from shortstack.engine.cpu import computing
    from shortstack.engine.load import losses_over
    from shortstack.engine.losses import token_nll

    check_windows(checkpoint, windows)
    rows = checkpoint.tensors[checkpoint.anatomy.embedding].shape[0]
    length = len(windows[0])
    by_logits = _LOGITS_BYTES.get(device.type, 128 << 20) // (length * rows * 4)
    fitting = max(1, _FEWEST_TOKENS // length, min(by_logits, _MOST_TOKENS // length))
    at_once = fitting if batch == "auto" else batch
    bar = (progress or Progress(quiet=True)).bar("windows", len(windows))
    with bar as advance, computing(model.dtype, device):

        def nll_of(model: Any, batch: Batch) -> torch.Tensor:
            ids_WT = batch["input_ids"]
            nll_WT = token_nll(model(input_ids=ids_WT, use_cache=False).logits, ids_WT)
            advance(len(ids_WT))
            return exact_place(nll_WT).double().mean(dim=1)

        nll = losses_over(model, window_batches(windows, at_once), nll_of, device)
    found: list[float] = torch.cat(nll).tolist()
    broken = [index for index, value in enumerate(found) if not math.isfinite(value)]
    if broken:
        raise ShortstackError(
            f"{checkpoint.source}: the loss of window {broken[0]} is not finite ({len(broken)} of {len(found)} windows)",
            hint="use --dtype float32; if it fails too, the weights are damaged (shortstack check)",
        )
    return found


def _windows_or_reason(
    ids: Sequence[int], bos: int | None, length: int, bos_every: bool, positions: int | None
) -> tuple[list[list[int]], str]:
    if bos_every and bos is None:
        return [], "the tokenizer has no BOS token"
    needed = length + 1 if bos_every else length
    if positions is not None and needed > positions:
        return [], f"{needed} tokens, but the model has {positions} positions"
    return cut_windows(ids, bos, length, bos_every=bos_every), ""


def _overlaps(checkpoint: Checkpoint, corpus: Corpus, ids: Sequence[int]) -> list[str]:
    """Warn where the model has met this text: the blocks were chosen on it, or the weights trained on it."""
    notes = []
    for step in (checkpoint.provenance or {}).get("steps", []):
        for calibration, how in (
            (nested(step, "why", "scores", "calibration"), "pruned by scores"),
            (nested(step, "calibration"), "quantized with calibration"),
        ):
            if nested(calibration, "sha256") == corpus.sha256:
                notes.append(f"warning: {checkpoint.source} was {how} on this very text ({corpus.source})")
            elif found := marked_windows(nested(calibration, "marks"), ids):
                notes.append(
                    f"warning: {checkpoint.source} was {how} on text that occurs in {corpus.source} "
                    f"({found} of its calibration windows)"
                )
        trained = nested(step, "data", "source") if step.get("stage") == "retrain" else None
        if isinstance(trained, str) and _same_place(trained, corpus.source):
            notes.append(f"warning: {checkpoint.source} was trained on this very text ({corpus.source})")
    return list(dict.fromkeys(notes))


def _same_place(one: str, other: str) -> bool:
    """Whether two sources are one file or folder, or one lies in the other."""
    paths = [Path(source).expanduser() for source in (one, other)]
    if not all(path.exists() for path in paths):
        return False  # named sets have a part for training and one for evaluation
    first, second = (path.resolve() for path in paths)
    return first == second or first in second.parents or second in first.parents


def parse_lengths(text: str | None) -> list[int] | None:
    """`128,2048` -> [128, 2048]: the windows' lengths, in tokens."""
    if text is None:
        return None
    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(
            f"--seq-len {text!r}: expected numbers separated by commas", hint="--seq-len 128,2048"
        ) from None
    if any(length < 2 for length in lengths):
        raise UsageError(f"--seq-len {text!r}: a window has at least 2 tokens")
    return lengths


def check_texts(values: Mapping[str, Any]) -> list[str]:
    """Look at the texts that would be read, before anything runs; lines about what could not be looked at.

    Raises:
        ShortstackError: one cannot be used.
    """
    parse_lengths(values.get("seq_len"))
    Windows.read(_TEXTS, values.get("limit"))
    notes = []
    folder = Path(values["data_dir"]) if values.get("data_dir") else None
    for text in text_names(values.get("data", _TEXTS.data)):
        look = functools.partial(evaluation_texts, text, folder)
        if folder is not None and text in LOCAL_COPIES:
            look()
        else:
            notes += preview(text, "evaluation", look)
    return notes
