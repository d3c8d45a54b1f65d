"""shortstack demo: serves the page until it is interrupted."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortstack.artifacts.results import Result, Results, load_results
from shortstack.artifacts.scores import load_scores
from shortstack.common.options import stage
from shortstack.common.progress import Progress
from shortstack.common.shown import Shown
from shortstack.demo import markup
from shortstack.demo.options import DemoOptions, Limits
from shortstack.demo.starter import starter_models
from shortstack.demo.writing import Column
from shortstack.errors import ShortstackError, UsageError, system_reason

_MOST = 4
_OPTIONS = DemoOptions()


@dataclass(frozen=True, repr=False)
class Served(Shown):
    """The page that was served.

    Attributes:
        url: The address of the page.
    """

    url: str

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return {"schema": 1, "url": self.url}

    def to_text(self) -> str:
        """One line."""
        return f"the page at {self.url} is closed"


@stage
def demo(
    *models: str,
    scores: str = "",
    results: str = "",
    options: DemoOptions = _OPTIONS,
) -> Served:
    """Serve a web page on which up to four checkpoints continue the same prompt, side by side.

    Without MODELS the page shows the small model of the package: dense, narrower, pruned and retrained. These are made
    when the page is first served, and kept. Ctrl-C stops the server.

    Args:
        models: The checkpoints: directories, hub ids such as `org/name@revision`, or `embedded`.
        scores: Show these scores.json files, separated by commas.
        results: Show these results.json files, separated by commas.
        options: where the page is, to whom it is served, and how the models are run.

    Returns:
        The address of the page.

    Raises:
        ShortstackError: `--public` without a password, the port is taken, or a file of scores or results is damaged.
    """
    from shortstack.demo.page import EXAMPLES, PYTHON_EXAMPLES, build

    login = _login(options)
    progress = Progress(quiet=options.quiet)
    names, score_files, result_files = _asked(models, scores, results, progress)
    shown = (_scores_tab(score_files, names.values()), _results_tab(result_files))
    columns = [Column(name, model, options.running) for name, model in names.items()]
    port = _free_port(options)
    limits = Limits()
    page = build(columns, *shown, limits, EXAMPLES if models else PYTHON_EXAMPLES)
    page.queue(max_size=limits.waiting, default_concurrency_limit=1, api_open=False)
    return _serve(page, port, options, login, progress)


def _login(options: DemoOptions) -> tuple[str, str] | None:
    password = os.environ.get(options.password_env, "")
    if password:
        return options.user, password
    if options.public:
        raise UsageError(
            f"--public serves the page to every machine that reaches this one, and {options.password_env} holds no password",
            hint=f"export {options.password_env}=..., or leave --public out and use an SSH tunnel",
        )
    return None


def _asked(
    models: Sequence[str], scores: str, results: str, progress: Progress
) -> tuple[dict[str, str], list[Path], list[Path]]:
    """Models by the name that the page gives them; files of scores; files of results."""
    files = [[Path(part.strip()) for part in text.split(",") if part.strip()] for text in (scores, results)]
    if len(models) > _MOST:
        raise UsageError(f"{len(models)} models given, expected at most {_MOST}")
    if models:
        return _named(models), files[0], files[1]
    made = starter_models(progress)
    return made.models, [made.scores, *files[0]], [made.results, *files[1]]


def _named(models: Sequence[str]) -> dict[str, str]:
    """The last part of each path, or all of it where that is not enough to tell them apart."""
    short = [Path(model.rstrip("/")).name or model for model in models]
    if len(set(short)) == len(short):
        return dict(zip(short, models, strict=True))
    named: dict[str, str] = {}
    for model in models:
        name, number = model, 2
        while name in named:
            name, number = f"{model} ({number})", number + 1
        named[name] = model
    return named


def _scores_tab(files: Sequence[Path], models: Any) -> str:
    """Charts of every criterion; a removed block is one that some checkpoint of the page lacks."""
    removed = _removed(models)
    pieces = []
    for file in files:
        found = load_scores(file)
        for criterion in found.criteria.values():
            if criterion.scores:
                pieces.append(markup.bars(criterion.scores, sorted(removed), criterion.blocks, criterion.name))
    return "".join(pieces) or '<p class="st-quiet">No scores were given: shortstack demo MODEL --scores scores.json</p>'


def _removed(models: Any) -> set[int]:
    from shortstack.artifacts import provenance

    removed: set[int] = set()
    for model in models:
        record = provenance.read(Path(model)) if Path(model).is_dir() else None
        if record:
            removed |= set(range(int(record["original_depth"]))) - set(record["kept_blocks"])
    return removed


def _results_tab(files: Sequence[Path]) -> str:
    from html import escape

    from shortstack.evaluation.compare import compared

    results: list[Result] = [result for file in files for result in load_results(file).results]
    if not results:
        return '<p class="st-quiet">No results were given: shortstack demo MODEL --results results.json</p>'
    several = len({result.model for result in results}) > 1
    text = compared(results, None, ()).to_text() if several else Results(tuple(results)).to_text()
    return f'<div class="st-table"><pre tabindex="0">{escape(text)}</pre></div>'


def _serve(page: Any, port: int, options: DemoOptions, login: tuple[str, str] | None, progress: Progress) -> Served:
    import gradio as gr

    _, url, _ = page.launch(
        server_name=_host(options), server_port=port, share=False, auth=[login] if login else None,
        prevent_thread_lock=True, quiet=True, show_error=False, allowed_paths=[], max_file_size=1, ssr_mode=False,
        pwa=False, mcp_server=False, enable_monitoring=False, footer_links=[], css=markup.STYLE,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        state_session_capacity=100,
    )  # fmt: skip
    if options.public:
        progress.say(
            f"the page is served to every machine that can reach this one; the user is {options.user}, with the password"
        )
    progress.say(f"the page is at {url} (Ctrl-C ends it)")
    try:
        _until_ended()
    finally:
        page.close(verbose=False)
    return Served(url)


def _host(options: DemoOptions) -> str:
    return "0.0.0.0" if options.public else "127.0.0.1"


def _free_port(options: DemoOptions) -> int:
    """The requested port, where it is free; for 0 one that is."""
    import socket

    with socket.socket() as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((_host(options), options.port))
        except OSError as error:
            raise ShortstackError(
                f"port {options.port} cannot be used: {system_reason(error)}",
                hint="use another --port, or --port 0 for a free port",
            ) from None
        return int(found.getsockname()[1])


def _until_ended() -> None:
    """Wait for Ctrl-C, or for the signal that service managers send; handlers are put back."""
    ended = threading.Event()
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, lambda *_: ended.set())
    try:
        ended.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
