"""The page itself: columns of checkpoints with their controls, their block scores, and the evaluation table."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gradio as gr

from shortstack.demo import markup
from shortstack.demo.options import RANGES, Limits
from shortstack.demo.writing import Asked, Column, Writing
from shortstack.errors import ShortstackError

# Beginnings that any language model can write on, and some for the small one of the package, which knows Python.
EXAMPLES = (
    "The Leaning Tower of Pisa is known for",
    "To make a good cup of tea, first",
    "The function sorts a list of numbers and returns",
    "Three reasons why people learn a second language are",
)
PYTHON_EXAMPLES = (
    "The with statement is used to",
    "Return a list of all",
    "If the file does not exist,",
    "A class is defined by",
)
_LABELS = {
    "new_tokens": "New tokens", "batch": "Texts at a time", "seed": "Seed", "top_k": "Top-k", "top_p": "Top-p",
    "temperature": "Temperature (0: the likeliest token)",
}  # fmt: skip
_STEPS = {"top_p": 0.05, "temperature": 0.05}


class Generations:
    """Which visitor's generation runs in which column, so that a stop button stops that one and no other."""

    def __init__(self) -> None:
        self._events: dict[tuple[str, int], threading.Event] = {}
        self._lock = threading.Lock()

    def begin(self, visitor: str, column: int) -> threading.Event:
        """The event that stops what begins now."""
        event = threading.Event()
        with self._lock:
            self._events[visitor, column] = event
        return event

    def end(self, visitor: str, column: int, event: threading.Event) -> None:
        """It has ended."""
        with self._lock:
            if self._events.get((visitor, column)) is event:
                del self._events[visitor, column]

    def stop(self, visitor: str) -> None:
        """Stop all that this visitor has running or waiting."""
        with self._lock:
            for (who, _), event in self._events.items():
                if who == visitor:
                    event.set()


def _visitor(request: gr.Request | None) -> str:
    return str(getattr(request, "session_hash", None) or "")


def build(
    columns: Sequence[Column], scores: str, results: str, limits: Limits, examples: Sequence[str] = EXAMPLES
) -> gr.Blocks:
    """The page.

    Args:
        columns: one to four checkpoints.
        scores: the second tab, as HTML.
        results: the third tab, as HTML.
        limits: what the server allows.
        examples: prompts to choose from; the first is there at the start.
    """
    generations = Generations()
    page: gr.Blocks
    with gr.Blocks(title="shortstack", analytics_enabled=False) as page:
        gr.Markdown("# shortstack: checkpoints side by side")
        with gr.Tab("Write"):
            _writing_tab(columns, generations, limits, examples)
        with gr.Tab("Block scores"):
            gr.HTML(scores)
        with gr.Tab("Evaluation"):
            gr.HTML(results)
    return page


def _controls(
    limits: Limits, examples: Sequence[str], has_template: bool
) -> tuple[gr.Textbox, list[gr.components.Component]]:
    prompt = gr.Textbox(
        label="Prompt", lines=3, max_lines=10, max_length=limits.characters, value=examples[0], elem_id="prompt"
    )
    gr.Examples([[text] for text in examples], [prompt], label="Examples", api_visibility="private")
    numbers: list[gr.components.Component] = []
    with gr.Accordion("Settings", open=False), gr.Row():
        for name, (low, high, start) in RANGES.items():
            step = _STEPS.get(name, 1)
            if name == "seed":
                numbers.append(
                    gr.Number(start, label=_LABELS[name], precision=0, minimum=low, maximum=high, elem_id=name)
                )
            else:
                numbers.append(gr.Slider(low, high, start, step=step, label=_LABELS[name], elem_id=name))
    chat = gr.Checkbox(
        False, label="As a chat message, where a model has a chat template", visible=has_template, elem_id="chat"
    )
    return prompt, [chat, *numbers]


def _writing_tab(columns: Sequence[Column], generations: Generations, limits: Limits, examples: Sequence[str]) -> None:
    prompt, settings = _controls(limits, examples, any(column.has_chat_template for column in columns))
    with gr.Row():
        everything = gr.Button("Generate with all", variant="primary", elem_id="generate-all")
        stop = gr.Button("Stop", elem_id="stop")
    runs = gr.State([])
    buttons, clicks = [], []
    with gr.Row(equal_height=False):
        for number, column in enumerate(columns):
            with gr.Column(min_width=260):
                gr.HTML(markup.head(column, number))
                button = gr.Button(
                    "Generate", interactive=not column.error, elem_id=f"generate-{number}",
                    elem_classes=f"generate-{number}",
                )  # fmt: skip
                text = gr.Textbox(
                    label=f"Text of {column.name}", lines=8, max_lines=24, interactive=False, elem_id=f"text-{number}",
                    buttons=["copy"],
                )  # fmt: skip
                said = gr.HTML(elem_id=f"said-{number}")
                record = gr.State(None)
                buttons.append((button, text, said, record))
    chart = gr.HTML(markup.chart([]), elem_id="chart")
    for number, (column, (button, text, said, record)) in enumerate(zip(columns, buttons, strict=True)):
        if column.error:
            continue
        run = gr.on(
            [button.click, everything.click], _writer(number, column, generations, limits),
            [prompt, *settings], [text, said, record], concurrency_limit=1, concurrency_id=f"column-{number}",
            api_visibility="private", show_progress="hidden",
        )  # fmt: skip
        clicks.append(run)
        record.change(_remember, [runs, record], [runs, chart], queue=False, api_visibility="private")
    stop.click(_stopper(generations), None, None, queue=False, api_visibility="private")


def _stopper(generations: Generations) -> Any:
    def stop(request: gr.Request) -> None:
        generations.stop(_visitor(request))

    return stop


def _remember(runs: list[dict[str, object]], record: dict[str, object] | None) -> tuple[list[dict[str, object]], str]:
    if record:
        runs = [*runs, record][-50:]
    return runs, markup.chart(runs)


def _writer(number: int, column: Column, generations: Generations, limits: Limits) -> Any:
    """What a click on this column's button runs."""

    def write(request: gr.Request, prompt: str, chat: bool, *numbers: float) -> Iterator[tuple[str, str, Any]]:
        visitor = _visitor(request)
        event = generations.begin(visitor, number)
        try:
            asked = Asked.within(limits, prompt, chat=chat, **dict(zip(RANGES, numbers, strict=True)))
            yield (
                "",
                _quiet("waiting ..." if column.lock.locked() else "loading ..." if not column.is_loaded else ""),
                None,
            )
            last: Writing | None = None
            for last in column.write(asked, event):
                if last.seconds > limits.seconds:
                    event.set()
                yield _shown(last.texts), markup.measures(last), gr.skip()
            if last is not None:
                yield _shown(last.texts), markup.measures(last), _record(number, column, asked, last)
        except ShortstackError as error:
            yield "", markup.failure(str(error)), None
        finally:
            generations.end(visitor, number, event)

    return write


def _quiet(text: str) -> str:
    return f'<p class="st-quiet">{text}</p>'


def _shown(texts: Sequence[str]) -> str:
    if len(texts) == 1:
        return texts[0]
    return "\n\n".join(f"[{number}] {text}" for number, text in enumerate(texts, start=1))


def _record(number: int, column: Column, asked: Asked, writing: Writing) -> Mapping[str, object]:
    words = f"{asked.batch} x {asked.new_tokens} tokens"
    return {"name": column.name, "column": number, "rate": writing.rate, "asked": words}
