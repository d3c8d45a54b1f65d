"""One checkpoint that writes for the page: loaded when it is first asked, one text at a time, token by token.

What is drawn depends on the seed and the number of the row alone, not on what else the process runs.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shortstack.common.formatting import count, size
from shortstack.data.chats import Chat, rendered
from shortstack.data.tokenizer import check_ids, end_of_text, open_ids, padding_id
from shortstack.demo.options import Limits
from shortstack.errors import ShortstackError, UsageError, first_line
from shortstack.evaluation.evaluated_model import Subject, open_subject
from shortstack.evaluation.options import EvaluationOptions
from shortstack.runtime.memory import used

if TYPE_CHECKING:
    import torch

_SHOWN_EVERY = 0.1  # seconds: a page that is redrawn for every token is slower than the model


@dataclass(frozen=True)
class Asked:
    """What a visitor requests; a value out of range is brought into it, whatever the page sent.

    Attributes:
        prompt: the text to write on.
        new_tokens: at most.
        batch: texts at a time.
        seed: of the drawing.
        top_k: draw among this many tokens.
        top_p: and among the likeliest that together have this probability.
        temperature: 0 takes the likeliest token.
        chat: hand the prompt over as a user's message, in the checkpoint's own form.
    """

    prompt: str
    new_tokens: int = 64
    batch: int = 1
    seed: int = 0
    top_k: int = 50
    top_p: float = 0.95
    temperature: float = 1.0
    chat: bool = False

    @classmethod
    def within(cls, limits: Limits, prompt: object, *, chat: object = False, **numbers: object) -> Asked:
        """What the page sent, within the server's limits.

        Raises:
            UsageError: there is no text, or it is too long.
        """
        text = prompt if isinstance(prompt, str) else ""
        if not text.strip():
            raise UsageError("the prompt is empty", hint="type a text, or choose an example")
        if len(text) > limits.characters:
            raise UsageError(f"the prompt has {len(text)} characters; {limits.characters} are allowed")
        kept = {name: limits.clamped(name, value) for name, value in numbers.items()}
        whole = {name: int(value) for name, value in kept.items() if name not in ("top_p", "temperature")}
        return cls(text, chat=bool(chat), **{**kept, **whole})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Writing:
    """How far a text is.

    Attributes:
        texts: one for each of the batch, without the prompt.
        tokens: new ones, of all texts together.
        seconds: since the model was asked.
        first: seconds to the first token; None before it is there.
        peak_bytes: the most memory during the run; None while it runs.
        peak_of: whose memory that is: the process's, with all models in it, or the device's.
        stopped: the visitor stopped it.
    """

    texts: Sequence[str]
    tokens: int
    seconds: float
    first: float | None
    peak_bytes: int | None = None
    peak_of: str = "process"
    stopped: bool = False

    @property
    def rate(self) -> float:
        """Tokens per second, of all texts together."""
        return self.tokens / self.seconds if self.seconds else 0.0


class Column:
    """A checkpoint as the page shows it: what it is, or why it cannot be opened; and what it writes.

    Attributes:
        name: what the page calls it.
        error: why it cannot be used; "" where it can.
        lock: whoever generates with it holds this.
    """

    def __init__(self, name: str, model: str, options: EvaluationOptions) -> None:
        self.name, self.model_name, self.error = name, model, ""
        self.lock = threading.Lock()
        self.subject: Subject | None = None
        try:
            self.subject = _opened(model, options)
            self.subject.tokenizer  # noqa: B018 - without one nothing can be written: its column says so immediately
        except ShortstackError as error:
            self.error = str(error)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Numbers, in the original model, of the blocks that it has."""
        return self.subject.checkpoint.original_blocks if self.subject else ()

    @property
    def original_depth(self) -> int:
        """Blocks of the model that it was made from."""
        record = self.subject.checkpoint.provenance if self.subject else None
        return int(record["original_depth"]) if record else len(self.blocks)

    @property
    def is_loaded(self) -> bool:
        """Whether the model is in memory."""
        return self.subject is not None and "model" in self.subject.__dict__

    @property
    def has_chat_template(self) -> bool:
        """Whether its tokenizer has one; the tokenizer is loaded for it."""
        return self.subject is not None and bool(self.subject.tokenizer.chat_template)

    @property
    def facts(self) -> str:
        """Family, depth, parameters and size, in one line."""
        if self.subject is None:
            return ""
        checkpoint = self.subject.checkpoint
        parameters = f"{count(checkpoint.parameters())} parameters"
        return " · ".join(
            [
                checkpoint.anatomy.family.model_type, f"{len(self.blocks)} blocks", parameters,
                size(checkpoint.nbytes),
            ]
        )  # fmt: skip

    def write(self, asked: Asked, stop: threading.Event) -> Iterator[Writing]:
        """The text as it grows; the last one has the memory. Closing the iterator stops the model.

        Raises:
            ShortstackError: the model cannot be loaded, or the prompt and the new tokens do not fit into its positions.
        """
        if self.subject is None:
            raise ShortstackError(self.error)
        with self.lock:
            yield from _written(self.subject, asked, stop)


def _opened(model: str, options: EvaluationOptions) -> Subject:
    from shortstack.common.progress import Progress

    return open_subject(model, options, Progress(quiet=options.quiet))


def _written(subject: Subject, asked: Asked, stop: threading.Event) -> Iterator[Writing]:
    model, tokenizer = _loaded(subject), subject.tokenizer
    ids = _prompt_ids(subject, asked)
    steps: queue.Queue[list[int] | BaseException | None] = queue.Queue()
    abandoned = threading.Event()

    def produce() -> None:
        _run(model, subject, ids, asked, steps, (stop, abandoned))

    worker = threading.Thread(target=_fed, args=(steps, produce), daemon=True, name="generation")
    rows: list[list[int]] = [[] for _ in range(asked.batch)]
    ends, ended = set(end_of_text(tokenizer)), [False] * asked.batch
    first, shown = None, 0.0
    try:
        with used(subject.place) as usage:
            started = time.perf_counter()
            worker.start()
            while (step := steps.get()) is not None:
                if isinstance(step, BaseException):
                    raise _reason(subject, step) from None
                now = time.perf_counter() - started
                first = now if first is None else first
                for number, token in enumerate(step):
                    ended[number] = ended[number] or token in ends
                    if not ended[number]:
                        rows[number].append(token)
                if now - shown >= _SHOWN_EVERY:
                    shown = now
                    yield Writing(_texts(tokenizer, rows), sum(map(len, rows)), now, first)
            seconds = time.perf_counter() - started
        peak = usage.peak_device_bytes or usage.peak_rss_bytes
        whose = "device" if usage.peak_device_bytes else "process"
        yield Writing(_texts(tokenizer, rows), sum(map(len, rows)), seconds, first, peak, whose, stop.is_set())
    finally:
        abandoned.set()
        if worker.ident is not None:
            worker.join()


def _loaded(subject: Subject) -> Any:
    try:
        return subject.model
    except (RuntimeError, ValueError, OSError, MemoryError) as error:
        raise _reason(subject, error) from None


def _reason(subject: Subject, error: BaseException) -> ShortstackError:
    if isinstance(error, ShortstackError):
        return error
    return ShortstackError(f"{subject.name}: {type(error).__name__}: {first_line(error)}")


def _texts(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[str]:
    return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in rows]


def _prompt_ids(subject: Subject, asked: Asked) -> list[int]:
    tokenizer = subject.tokenizer
    if asked.chat and tokenizer.chat_template:
        text = rendered(Chat(subject.name, [{"role": "user", "content": asked.prompt}]), tokenizer, prompt=True)
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    else:
        ids = open_ids(tokenizer, asked.prompt)
    if not ids:
        raise UsageError(f"{subject.name}: its tokenizer has no token for this prompt")
    check_ids(tokenizer, ids, subject.rows, subject.name)
    too_long = subject.checkpoint.too_long(len(ids), asked.new_tokens)
    if too_long:
        raise UsageError(too_long, hint="use a shorter prompt, or fewer new tokens")
    return ids


def _fed(steps: queue.Queue[list[int] | BaseException | None], produce: Callable[[], None]) -> None:
    """In a thread of its own: every step's tokens into the queue, then None, or what went wrong."""
    try:
        produce()
        steps.put(None)
    except BaseException as error:
        steps.put(error)


def _run(
    model: Any,
    subject: Subject,
    ids: list[int],
    asked: Asked,
    steps: queue.Queue[list[int] | BaseException | None],
    stops: Sequence[threading.Event],
) -> None:
    import torch
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer

    from shortstack.evaluation.generate import Drawing, KeyedDraw

    class Steps(BaseStreamer):  # type: ignore[misc]
        """Tokens of all rows, step by step; the first thing that it is given is the prompt."""

        def __init__(self) -> None:
            self.begun = False

        def put(self, value: torch.Tensor) -> None:
            if self.begun:
                steps.put(value.reshape(-1).tolist())
            self.begun = True

        def end(self) -> None:
            pass

    class Stop(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # noqa: ARG002 - transformers names it
            wanted = any(event.is_set() for event in stops)
            return torch.full((len(input_ids),), wanted, dtype=torch.bool, device=input_ids.device)

    ids_BT = torch.tensor([ids] * asked.batch, device=subject.place)
    processors = []
    if asked.temperature > 0:
        drawing = Drawing(asked.seed, temperature=asked.temperature, top_k=asked.top_k, top_p=asked.top_p)
        processors.append(KeyedDraw(drawing, range(asked.batch)))
    ends = sorted(set(end_of_text(subject.tokenizer)))
    config = GenerationConfig(
        do_sample=False, num_beams=1, repetition_penalty=1.0, no_repeat_ngram_size=0, max_new_tokens=asked.new_tokens,
        min_new_tokens=0, pad_token_id=padding_id(subject.tokenizer), eos_token_id=ends or None,
    )  # fmt: skip
    with torch.inference_mode(), contextlib.suppress(StopIteration):
        model.generate(
            ids_BT, attention_mask=torch.ones_like(ids_BT), generation_config=config, streamer=Steps(),
            logits_processor=LogitsProcessorList(processors), stopping_criteria=StoppingCriteriaList([Stop()]),
        )  # fmt: skip
