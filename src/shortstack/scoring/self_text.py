"""`self:PROMPTS`: calibration text that the dense model writes itself, sampled once for a seed and kept."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.json_text import json_text
from shortstack.common.options import refuse_idle
from shortstack.common.progress import Progress
from shortstack.common.source_names import SELF
from shortstack.data.answers import IGNORED
from shortstack.data.calibration import CalibrationOptions, CalibrationSet, draw_windows
from shortstack.data.files import TEXT_SUFFIXES
from shortstack.data.instructions import labelled_row
from shortstack.data.sources import Corpus, read_corpus
from shortstack.data.tokenizer import load_tokenizer, open_ids
from shortstack.errors import ShortstackError, UsageError
from shortstack.runtime.distributed import Process
from shortstack.scoring.options import ScoreOptions, StoppingOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def self_windows(
    checkpoint: Checkpoint,
    calibration: CalibrationOptions,
    stopping: StoppingOptions,
    options: ScoreOptions,
    progress: Progress,
) -> CalibrationSet:
    """Windows of what the model writes itself.

    Raises:
        UsageError: an option that is about other text.
    """
    if stopping.until is not None:
        raise UsageError("--until stable: needs more windows than `self:` has generated", hint="--samples 40")
    refuse_idle(calibration, ["sampling", "chat_template"], "with self:PROMPTS, which is written window by window")
    corpus = self_written(checkpoint, calibration, options, progress)
    tokenizer = load_tokenizer(checkpoint, trust_remote_code=options.trust_remote_code)
    return draw_windows(corpus, tokenizer, options=calibration).read_by(checkpoint.tokenizer)


def self_written(
    checkpoint: Checkpoint, calibration: CalibrationOptions, options: ScoreOptions, progress: Progress
) -> Corpus:
    """Continuations of prompts, drawn from the dense model: prompt and continuation, of which the continuation counts.

    Prompts are rows of text, instructions or chats, and the lines of text files; of each at most half a window is kept. They
    are taken in an order that the seed draws, as many as the windows need. What was written is kept in the cache.

    Args:
        calibration: `data` is `self:` and the source of the prompts.

    Raises:
        ShortstackError: no prompts, windows longer than the model's positions, or several processes before it is kept.
    """
    from shortstack.evaluation.evaluated_model import Subject
    from shortstack.evaluation.options import EvaluationOptions

    source, positions = calibration.data.removeprefix(SELF), checkpoint.positions
    if positions is not None and calibration.seq_len > positions:
        raise ShortstackError(
            f"windows of {calibration.seq_len} tokens, but {checkpoint.source} has {positions} positions",
            hint=f"--seq-len {positions}",
        )
    corpus = read_corpus(source, role="calibration", limit_bytes=32 << 20, answered=True, progress=progress)
    how = EvaluationOptions(
        device=options.device,
        dtype=options.dtype,
        tokenizer=options.tokenizer,
        trust_remote_code=options.trust_remote_code,
    )
    subject = Subject(checkpoint, how, progress)
    prompts = _prompts(corpus, source, subject.tokenizer, calibration.seq_len // 2)
    key = {
        "what": "self-written text",
        "prompts": hashlib.sha256(json_text(prompts).encode()).hexdigest(),
        **{name: getattr(calibration, name) for name in ("samples", "seq_len", "seed")},
    }

    def write() -> dict[str, Any]:
        if Process.from_environment().world > 1:
            raise ShortstackError(
                f"--data {calibration.data}: the text is not generated yet, and each process would generate its own",
                hint="run the command in one process first; the text is kept",
            )
        return {"rows": _written(subject, prompts, calibration)}

    found, _ = subject.found("its own text", key, write)
    subject.release()
    digest = hashlib.sha256(json_text(found["rows"]).encode()).hexdigest()
    rows = tuple((ids, counted) for ids, counted in found["rows"])
    detail = f"{len(rows)} continuations that the model drew itself, of the prompts with sha256 {corpus.sha256}"
    return Corpus(calibration.data, digest, written=rows, detail=detail)


def _prompts(corpus: Corpus, source: str, tokenizer: PreTrainedTokenizerBase, most: int) -> list[list[int]]:
    """The first tokens of each prompt."""
    if corpus.windows:
        raise ShortstackError(
            f"{source}: rows of input_ids cannot be used as prompts", hint="give rows of text, or of instructions"
        )
    texts = list(corpus.documents)
    if source.endswith(TEXT_SUFFIXES) or Path(source).is_dir():
        texts = [line for text in texts for line in text.splitlines()]
    prompts = [open_ids(tokenizer, text.strip()) for text in texts if text.strip()]
    rows: list[tuple[str, Any]] = [*corpus.instructions, *((chat.place, chat) for chat in corpus.chats)]
    for place, row in rows:
        ids, labels = labelled_row(place, row, tokenizer)
        prompts.append(ids[: next((n for n, label in enumerate(labels) if label != IGNORED), len(ids))])
    kept = [prompt[:most] for prompt in prompts if prompt]
    if not kept:
        raise ShortstackError(f"{source}: no prompt has a token", hint="give a source with text")
    return kept


def _written(subject: Any, prompts: Sequence[list[int]], calibration: CalibrationOptions) -> list[Any]:
    """(token ids, which of them count) of as many prompts as fill the windows, each continued up to a window's length."""
    from shortstack.evaluation.generate import Drawing, continued

    seq_len, samples = calibration.seq_len, calibration.samples
    order = list(range(len(prompts)))
    random.Random(calibration.seed).shuffle(order)
    rows: list[Any] = []
    while order and sum(len(ids) for ids, _ in rows) < samples * seq_len:
        chosen, order = [prompts[number] for number in order[:samples]], order[samples:]
        drawing = Drawing(calibration.seed + len(rows))
        lengths, positions = [len(prompt) for prompt in chosen], subject.checkpoint.positions
        most = seq_len - min(lengths)
        new_tokens = most if positions is None else min(most, positions - max(lengths))
        texts = continued(subject, chosen, new_tokens=new_tokens, drawing=drawing)
        for prompt, (new, _) in zip(chosen, texts, strict=True):
            ids = [*prompt, *new][:seq_len]
            rows.append([ids, [number >= len(prompt) for number in range(len(ids))]])
    return rows
