"""The part of a check that lets engines generate: each greedy token must be the one that transformers chooses in float32.

The engines run first, each in a process of its own; then transformers reads every prompt with what an engine wrote, in one
pass, and its logits judge each token. Where a token is not its first choice, the two logits say whether rounding explains it.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.benchmark.engines import ENGINES, Engine, engine_names, open_engine
from shortstack.benchmark.options import EngineOptions
from shortstack.common.formatting import size
from shortstack.common.options import refuse_idle
from shortstack.common.progress import Progress
from shortstack.errors import ShortstackError, UsageError
from shortstack.evaluation.evaluated_model import Subject
from shortstack.inspection.findings import Findings
from shortstack.runtime.memory import available_bytes

if TYPE_CHECKING:
    import torch

FOUND = "found"
NEW_TOKENS = 32
PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a little girl who",
    "def add(a, b):\n    ",
    "1, 2, 3, 4, 5,",
)
# Where tokenizers differ that mean to be the same: spaces, digits, other scripts, contractions.
_TEXTS = (
    *PROMPTS,
    "  two  spaces,\n\n lines\tand tabs",
    "2026-11-26: 3.14159 x 1000000",
    "Zürich, 東京, I'll we've DON'T 🙂",
)
# How far below the first choice a token's logit may be, for rounding to explain it. What stores weights in fewer bits than
# these computes another model: 1.0.
_ROUNDING = {"float32": 0.01, "F32": 0.05, "float16": 0.2, "F16": 0.2, "bfloat16": 0.5, "BF16": 0.5}
_FEWER_BITS = 1.0


@dataclass(frozen=True)
class EngineCheck:
    """What engines are to be checked.

    Attributes:
        names: rows of the table of engines.
        all_found: they are all that there are: those that are not installed are skipped.
        where: where they are.
        gguf: the GGUF file, for llama.cpp; None for the one that belongs to the checkpoint.
    """

    names: Sequence[str]
    all_found: bool
    where: EngineOptions
    gguf: Path | None = None

    @classmethod
    def of(cls, engine: str, where: EngineOptions, gguf: Path | None = None) -> EngineCheck:
        """From what `--engine` says: names separated by commas, or `found`.

        Raises:
            UsageError: one is not known.
        """
        known = [name for name, row in ENGINES.items() if row.checked]
        if engine.strip() == FOUND:
            return cls(known, True, where, gguf)
        names = engine_names(engine, [*known, FOUND])
        if FOUND in names:
            raise UsageError(f"--engine {engine!r}: `{FOUND}` is all that are installed", hint=f"--engine {FOUND}")
        if len(names) > 1 and (where.engine_python or where.engine_binary):
            raise UsageError(
                f"--engine {engine!r}: --engine-python and --engine-binary are for one engine",
                hint="give one engine, or set SHORTSTACK_ENGINES=DIR (`make engines` fills it)",
            )
        if names == ["transformers"]:
            refuse_idle(where, ["engine_binary", "engine_args"], "with --engine transformers")
            if where.engine_python is None:
                refuse_idle(where, ["time_limit"], "with --engine transformers, which is not started as a program")
        return cls(names, False, where, gguf)


@dataclass(frozen=True)
class Other:
    """A token of an engine that is not the first choice of transformers.

    Attributes:
        prompt: the number of the prompt.
        at: the number of the new token, from 0.
        token: the engine's.
        first: that of transformers.
        gap: how far the logit of the engine's token is below the other.
    """

    prompt: int
    at: int
    token: int
    first: int
    gap: float


def check_engines(findings: Findings, subject: Subject, wanted: EngineCheck, progress: Progress) -> None:
    """Let every engine continue some prompts, and judge what each wrote.

    Args:
        findings: gets the lines.
        subject: the checkpoint, to be computed in float32.
        wanted: which engines, and where.
        progress: shows which one runs.

    Raises:
        UsageError: an engine that was named is not there.
    """
    needed, free = subject.checkpoint.parameters() * 4, available_bytes()
    if needed > free:
        findings.add("engines", "skip", f"not tried: {size(needed)} in float32 to compare with, {size(free)} free")
        return
    with contextlib.ExitStack() as closing:
        _check(findings, subject, _with_gguf(findings, subject, wanted, progress, closing), progress)


def _with_gguf(
    findings: Findings, subject: Subject, wanted: EngineCheck, progress: Progress, closing: contextlib.ExitStack
) -> EngineCheck:
    """For llama.cpp and a checkpoint without a GGUF file, one of float32 that is thrown away when `closing` ends."""
    from shortstack.benchmark.engines.converter import find_converter
    from shortstack.benchmark.engines.llama_cpp import gguf_files

    if "llama.cpp" not in wanted.names or wanted.gguf is not None or gguf_files(subject):
        return wanted
    try:
        _opened("llama.cpp", subject, wanted).find()
        converter = find_converter(None, None)
    except UsageError:
        return wanted  # a line says what is missing: the engine, or the file
    file = Path(closing.enter_context(tempfile.TemporaryDirectory(prefix="shortstack-check-"))) / "model.gguf"
    progress.say("llama.cpp: converting the checkpoint to a GGUF file for this check ...")
    try:
        converter.convert(subject.checkpoint, file, "f32", wanted.where.time_limit)
    except ShortstackError as error:
        findings.add("llama.cpp", "fail", f"{error.message}{f' ({error.hint})' if error.hint else ''}")
        return replace(wanted, names=[name for name in wanted.names if name != "llama.cpp"])
    return replace(wanted, gguf=file)


def _check(findings: Findings, subject: Subject, wanted: EngineCheck, progress: Progress) -> None:
    prompts = _prompts(subject)
    runs: list[tuple[Engine, list[list[int]]]] = []
    for engine in _installed(findings, subject, wanted):
        progress.say(f"{engine.name}: {len(prompts)} prompts, {NEW_TOKENS} new tokens each ...")
        try:
            tokens = engine.greedy(prompts, _new_tokens(subject, prompts))
            _same_ids(findings, subject, engine)
        except ShortstackError as error:
            findings.add(engine.name, "fail", f"{error.message}{f' ({error.hint})' if error.hint else ''}")
            continue
        finally:
            if not engine.in_process:
                engine.stop()
        runs.append((engine, tokens))
    try:
        for engine, tokens in runs:
            _judge(findings, subject, engine, prompts, tokens)
    except ShortstackError as error:  # transformers cannot load it here
        findings.add("engines", "skip", f"not compared: {error.message}")
    finally:
        subject.release()


def others(
    model: Any, prompts: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]], special: Sequence[int] = ()
) -> Iterator[Other]:
    """Tokens that are not a model's first choice, given the prompt and what was written before.

    Some engines suppress end-of-text tokens where they are to write on: what is not special itself is compared with the first
    choice among what is not special.
    """
    import torch

    for number, (prompt, written) in enumerate(zip(prompts, tokens, strict=True)):
        ids_BT = torch.tensor([[*prompt, *written]])
        with torch.no_grad():
            logits_TV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits[0, len(prompt) - 1 :].float()
        written_T = torch.tensor(written)
        suppressed = torch.tensor(special, dtype=torch.long)
        plain_T = ~torch.isin(written_T, suppressed)
        logits_TV[plain_T.nonzero(), suppressed] = -torch.inf
        yield from _others(number, logits_TV, written_T)


def _others(number: int, logits_TV: torch.Tensor, written_T: torch.Tensor) -> Iterator[Other]:
    best_T, first_T = logits_TV.max(-1)
    gap_T = best_T - logits_TV.gather(-1, written_T[:, None])[:, 0]
    for at in gap_T.nonzero()[:, 0].tolist():
        yield Other(number, at, int(written_T[at]), int(first_T[at]), float(gap_T[at]))


def _installed(findings: Findings, subject: Subject, wanted: EngineCheck) -> Iterator[Engine]:
    """The engines, looked for before any is run; those that are not there are skipped, or refused where they were named."""
    engines = []
    for name in wanted.names:
        engine = _opened(name, subject, wanted)
        try:
            engine.find()
        except UsageError as error:
            if not wanted.all_found:
                raise
            findings.add(name, "skip", error.message)
            continue
        engines.append(engine)
    yield from engines


def _opened(name: str, subject: Subject, wanted: EngineCheck) -> Engine:
    if name == "transformers" and wanted.where.engine_python is not None and not wanted.all_found:
        from shortstack.benchmark.engines.worker import WorkerEngine

        return WorkerEngine(subject, wanted.where, name)
    more = {"gguf": wanted.gguf} if name == "llama.cpp" and wanted.gguf is not None else {}
    return open_engine(name, subject, wanted.where, **more)


def _judge(
    findings: Findings, subject: Subject, engine: Engine, prompts: Sequence[Sequence[int]], tokens: list[list[int]]
) -> None:
    what = f"{len(prompts)} prompts, {len(tokens[0])} new tokens each"
    by = f"{engine.name} {engine.version}, {engine.precision}"
    outside = [token for row in tokens for token in row if not 0 <= token < subject.rows]
    if outside:
        findings.add(engine.name, "fail", f"token {outside[0]}, but the embedding has {subject.rows} rows; {by}")
        return
    found = list(others(subject.model, prompts, tokens, _special(subject)))
    if not found:
        findings.add(engine.name, "ok", f"{what}: the tokens of transformers in float32; {by}")
        return
    widest = max(one.gap for one in found)
    allowed = _ROUNDING.get(engine.precision, _FEWER_BITS)
    first = found[0]
    says = (
        f"new token {first.at + 1} of prompt {first.prompt + 1} is {_shown(subject, first.token)}, that of transformers in "
        f"float32 {_shown(subject, first.first)}; their logits differ by {first.gap:.2g} there. {what}: {len(found)} tokens "
        f"are not its first choice, at most {widest:.2g} below it, which rounding "
        f"{'explains' if widest <= allowed else 'does not explain'}; {by}"
    )
    findings.add(engine.name, "note" if widest <= allowed else "fail", says)


def _same_ids(findings: Findings, subject: Subject, engine: Engine) -> None:
    """An engine with a tokenizer of its own reads text as the checkpoint's does."""
    try:
        tokenizer = subject.tokenizer
    except ShortstackError:
        return  # there is a line about that already
    found = engine.tokenize(_TEXTS)
    if found is None:
        return
    what = f"{engine.name} tokenizer"
    for text, ids in zip(_TEXTS, found, strict=True):
        own = [int(token) for token in tokenizer(text)["input_ids"]]
        if ids != own:
            findings.add(what, "fail", f"{text!r} is {_few(ids)}, and {_few(own)} by the checkpoint's tokenizer")
            return
    findings.add(what, "ok", f"{len(_TEXTS)} texts: the ids of the checkpoint's tokenizer")


def _prompts(subject: Subject) -> list[list[int]]:
    """Tokens of some texts; of a model without a tokenizer, ids that are counted up."""
    try:
        tokenizer = subject.tokenizer
        prompts = [[int(token) for token in tokenizer(text)["input_ids"]] for text in PROMPTS]
    except ShortstackError:
        prompts = [[(first + at) % subject.rows for at in range(5)] for first in range(3, 3 + len(PROMPTS))]
    positions = subject.checkpoint.positions
    return [prompt[: max(1, positions // 2)] for prompt in prompts] if positions else prompts


def _new_tokens(subject: Subject, prompts: Sequence[Sequence[int]]) -> int:
    positions = subject.checkpoint.positions
    longest = max(map(len, prompts))
    return NEW_TOKENS if not positions else max(1, min(NEW_TOKENS, positions - longest))


def _special(subject: Subject) -> list[int]:
    """Ids of end-of-text and other special tokens."""
    stated = [subject.model.generation_config.eos_token_id, subject.checkpoint.text_config.get("eos_token_id")]
    ids = {token for one in stated for token in (one if isinstance(one, list) else [one]) if isinstance(token, int)}
    with contextlib.suppress(ShortstackError):  # there is a line about that already
        ids |= set(subject.tokenizer.all_special_ids)
    return sorted(token for token in ids if 0 <= token < subject.rows)


def _shown(subject: Subject, token: int) -> str:
    try:
        return f"{token} {str(subject.tokenizer.decode([token]))!r}"
    except ShortstackError:
        return str(token)


def _few(ids: Sequence[int]) -> str:
    return f"[{', '.join(map(str, ids[:8]))}{', ...' if len(ids) > 8 else ''}]"
