"""Perplexity, exactly as published: rows joined by blank lines, windows side by side, both BOS policies.

Legend: W windows, T tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.calibration import check_windows
from shortstack.checkpoint.reader import Checkpoint
from shortstack.checkpoint.writer import check_writable_file
from shortstack.corpora import Corpus, read_corpus
from shortstack.errors import ShortstackError, UsageError
from shortstack.evaluation.results import Figure, Result, Results
from shortstack.machine import DType, peak_rss_bytes
from shortstack.opening import open_model
from shortstack.progress import Progress
from shortstack.records import nested
from shortstack.tokenizers import load_tokenizer

if TYPE_CHECKING:
    import torch

DEFAULT_SEQ_LENS = (128, 2048)
_LOGITS_BYTES = 128 << 20  # logits held at once, float32
_TOKENS_AT_A_TIME = 4096


def evaluate_ppl(
    *models: str,
    data: str = "embedded",
    seq_len: str | None = None,
    out: Path | None = None,
    batch: int | None = None,
    dtype: DType = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> Results:
    """Perplexity of checkpoints on texts, with standard errors. Lower is better.

    Rows are joined by blank lines, tokenized without special tokens, and cut into windows side by side (the tail is
    dropped). Two figures per length: BOS once in front of everything (`ppl_L`), and BOS in front of every window
    (`ppl_L_bos_every`).

    Args:
        models: checkpoint directories, hub ids such as `org/name@revision`, or `embedded`.
        data: texts, separated by commas: `embedded` (its held-out part), a file, or a folder.
        seq_len: window lengths, separated by commas; by default 128, and 2048 where the model has as many positions.
        out: write the results here (results.json).
        batch: windows at a time; by default as many as are fast.
        dtype: what to compute in; `auto` is float32 on a CPU, the checkpoint's own elsewhere.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        trust_remote_code: run code that comes with the checkpoint.
        quiet: no progress on stderr.

    Returns:
        A result per checkpoint and text.

    Raises:
        ShortstackError: a checkpoint or text cannot be read, or is too short for one window.
    """
    if not models:
        raise UsageError("no model given", hint="shortstack eval ppl MODEL...")
    if out is not None:
        check_writable_file(Path(out))
    lengths = parse_lengths(seq_len)
    corpora = [read_corpus(source.strip(), role="evaluation") for source in data.split(",")]
    checkpoints = [open_model(model) for model in models]
    results = []
    for checkpoint in checkpoints:
        results += _evaluate_one(
            checkpoint, corpora, lengths, batch, dtype, device, trust_remote_code, Progress(quiet=quiet)
        )
    found = Results(tuple(results))
    if out is not None:
        found.save(out)
    return found


def cut_windows(ids: Sequence[int], bos: int | None, seq_len: int, *, bos_every: bool) -> list[list[int]]:
    """The published windows of a tokenized text: BOS once in front, then cuts of `seq_len`; the tail is dropped.

    With `bos_every` each window has BOS in front of it besides, and so is one token longer.
    """
    stream = [bos, *ids] if bos is not None and not bos_every else list(ids)
    windows = [stream[start : start + seq_len] for start in range(0, len(stream) - seq_len + 1, seq_len)]
    return [[bos, *window] for window in windows] if bos is not None and bos_every else windows


def _evaluate_one(
    checkpoint: Checkpoint,
    corpora: Sequence[Corpus],
    lengths: Sequence[int] | None,
    batch: int | None,
    dtype: DType,
    device: str,
    trust_remote_code: bool,
    progress: Progress,
) -> list[Result]:
    from shortstack.engine.loading import load_model

    tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
    model, computed, place = load_model(checkpoint, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    positions = checkpoint.positions
    chosen = lengths or [n for n in DEFAULT_SEQ_LENS if n == DEFAULT_SEQ_LENS[0] or (positions or n) >= n]
    results = []
    for corpus in corpora:
        started = time.perf_counter()
        text = "\n\n".join(_texts(corpus))
        ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        figures: dict[str, Figure] = {}
        per_item: dict[str, list[Any]] = {}
        notes = _notes(checkpoint, corpus)
        for length in chosen:
            for bos_every in (False, True):
                name = f"ppl_{length}" + ("_bos_every" if bos_every else "")
                windows, reason = _windows_or_reason(ids, tokenizer.bos_token_id, length, bos_every, positions)
                if reason:
                    figures[name] = Figure(None, None, "ppl", 0, reason)
                    notes.append(f"{checkpoint.source}: {name} is not there: {reason}")
                    continue
                if not windows:
                    raise ShortstackError(
                        f"{corpus.source}: a window of {length} tokens needs {length} tokens, there are {len(ids)}",
                        hint="give more text, or a smaller --seq-len",
                    )
                nll_W = window_nll(model, windows, checkpoint, batch=batch, device=place, progress=progress)
                figures[name] = _perplexity(nll_W, len(windows[0]) - 1)
                per_item[name] = nll_W
        results.append(
            Result(
                model=checkpoint.source,
                fingerprint=checkpoint.fingerprint,
                what="ppl",
                data=corpus.described(),
                settings={"dtype": str(computed).removeprefix("torch."), "device": str(place), "joined_by": "\n\n"},
                figures=figures,
                parameters=checkpoint.parameters(),
                nbytes=checkpoint.nbytes,
                seconds=time.perf_counter() - started,
                peak_rss_bytes=peak_rss_bytes(),
                per_item=per_item,
                notes=notes,
            )
        )
    return results


def window_nll(
    model: Any,
    windows: Sequence[Sequence[int]],
    checkpoint: Checkpoint,
    *,
    batch: int | None = None,
    device: torch.device,
    progress: Progress | None = None,
) -> list[float]:
    """Mean NLL per predicted token (all but the first) of each window, in nats.

    Raises:
        ShortstackError: a token id has no embedding, or an NLL is not finite.
    """
    import torch

    from shortstack.engine.linear import fast_linear, largest_matrix
    from shortstack.engine.loss import token_nll

    check_windows(checkpoint, windows)
    rows = checkpoint.tensors[checkpoint.anatomy.embedding].shape[0]
    length = len(windows[0])
    by_logits = max(1, _LOGITS_BYTES // (length * rows * 4))
    at_once = batch or max(1, min(by_logits, _TOKENS_AT_A_TIME // length))
    found: list[float] = []
    with (
        (progress or Progress(quiet=True)).bar("windows", len(windows)) as advance,
        fast_linear(model.dtype, device, largest_matrix(checkpoint)),
        torch.no_grad(),
    ):
        for start in range(0, len(windows), at_once):
            ids_WT = torch.tensor([list(window) for window in windows[start : start + at_once]], device=device)
            nll = token_nll(model(input_ids=ids_WT, use_cache=False).logits, ids_WT)
            found += nll.double().mean(dim=1).tolist()
            advance(len(ids_WT))
    broken = [index for index, value in enumerate(found) if not math.isfinite(value)]
    if broken:
        raise ShortstackError(
            f"{checkpoint.source}: the loss of window {broken[0]} is not finite ({len(broken)} of {len(found)} windows)",
            hint="the weights hold NaN, or --dtype float32 is needed",
        )
    return found


def _perplexity(nll_W: Sequence[float], predicted: int) -> Figure:
    windows = len(nll_W)
    mean = math.fsum(nll_W) / windows
    value = math.exp(mean) if mean < 709 else None
    stderr = None
    if windows > 1 and value is not None:
        variance = math.fsum((nll - mean) ** 2 for nll in nll_W) / (windows - 1)
        stderr = value * math.sqrt(variance / windows)  # of exp(mean), to first order
    return Figure(value, stderr, "ppl", windows * predicted)


def _windows_or_reason(
    ids: Sequence[int], bos: int | None, length: int, bos_every: bool, positions: int | None
) -> tuple[list[list[int]], str]:
    if bos_every and bos is None:
        return [], "the tokenizer has no BOS token"
    needed = length + 1 if bos_every else length
    if positions is not None and needed > positions:
        return [], f"{needed} tokens, but the model has {positions} positions"
    return cut_windows(ids, bos, length, bos_every=bos_every), ""


def _texts(corpus: Corpus) -> list[str]:
    if not corpus.documents:
        raise ShortstackError(f"{corpus.source}: perplexity needs text, these are rows of another kind")
    return corpus.documents


def _notes(checkpoint: Checkpoint, corpus: Corpus) -> list[str]:
    """Warn where the text is the one that the blocks were chosen on."""
    for step in (checkpoint.provenance or {}).get("steps", []):
        if nested(step, "why", "scores", "calibration", "sha256") == corpus.sha256:
            return [f"warning: {checkpoint.source} was pruned by scores on this very text ({corpus.source})"]
    return []


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
