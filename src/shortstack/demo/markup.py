"""Pieces of the page that are written as HTML: every text that comes from a checkpoint, a file or a visitor is escaped."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from html import escape

from shortstack.common.formatting import ranges, size
from shortstack.demo.writing import Column, Writing

_LOGARITHMS_ABOVE = 20  # times the median
_CHART_ROWS = 12  # of the running chart: the latest
COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea")  # one for each column; readable on light and dark


def head(column: Column, number: int) -> str:
    """What a column is: its name, its facts, its strip of blocks; or why it cannot be used."""
    title = f'<h3 style="border-color:{COLOURS[number % len(COLOURS)]}">{escape(column.name)}</h3>'
    if column.error:
        return f'<div class="st-head">{title}{failure(column.error)}</div>'
    return (
        f'<div class="st-head">{title}<p>{escape(column.facts)}</p>{strip(column.blocks, column.original_depth)}</div>'
    )


def strip(blocks: Sequence[int], depth: int) -> str:
    """The blocks of the original model side by side, from the embedding to the head: full where one is here."""
    kept = set(blocks)
    words = (
        f"all {depth} blocks are here" if len(kept) == depth else f"blocks {ranges(blocks)} of 0-{depth - 1} are here"
    )
    cells = "".join(f'<i class="{"" if n in kept else "gone"}" title="block {n}"></i>' for n in range(depth))
    return f'<div class="st-strip" role="img" aria-label="{escape(words)}">{cells}</div>'


def failure(text: str) -> str:
    """An error, in its column."""
    return f'<p class="st-error" role="alert">{escape(text)}</p>'


def measures(writing: Writing) -> str:
    """Time, time to the first token, tokens per second, peak memory."""
    parts = [f"{writing.seconds:.2f} s", f"{writing.tokens} tokens", f"{writing.rate:.1f} tokens/s"]
    if writing.first is not None:
        parts.insert(1, f"first token after {writing.first:.2f} s")
    if writing.peak_bytes is not None:
        parts.append(f"peak memory of the {writing.peak_of} {size(writing.peak_bytes)}")
    if writing.stopped:
        parts.append("stopped")
    return f'<p class="st-measures" aria-live="polite">{" · ".join(parts)}</p>'


def chart(runs: Sequence[Mapping[str, object]]) -> str:
    """Tokens per second of the latest runs, a bar each; `runs` has name, column, rate and what was asked."""
    latest = list(runs)[-_CHART_ROWS:]
    if not latest:
        return '<p class="st-quiet">The speed of each run appears here.</p>'
    longest = max(float(str(run["rate"])) for run in latest) or 1.0
    rows = "".join(
        f'<tr><th scope="row">{escape(str(run["name"]))}</th><td>{escape(str(run["asked"]))}</td>'
        f'<td class="st-bar"><span style="width:{float(str(run["rate"])) / longest:.1%};'
        f'background:{COLOURS[int(str(run["column"])) % len(COLOURS)]}"></span></td>'
        f"<td>{float(str(run['rate'])):.1f}</td></tr>"
        for run in latest
    )
    return (
        '<table class="st-chart"><caption>Speed of the latest runs</caption><thead><tr><th>model</th><th>asked</th>'
        f"<th></th><th>tokens/s</th></tr></thead><tbody>{rows}</tbody></table>"
    )


def bars(scores: Sequence[float], removed: Collection[int], numbers: Sequence[int], label: str) -> str:
    """A chart of block scores: a bar for each block, removed ones in another colour and named in words.

    Scores of very different sizes are shown by their logarithms, and the words say so.
    """
    finite = sorted(score for score in scores if math.isfinite(score))
    wide = bool(finite) and finite[0] > 0 and finite[-1] > _LOGARITHMS_ABOVE * finite[len(finite) // 2]
    heights = [_height(score, finite, wide) for score in scores]
    words = f"{label}: {len(scores)} blocks" + (", by their logarithms" if wide else "")
    words += f"; removed: {ranges(sorted(removed))}" if removed else "; none is removed"
    cells = "".join(
        f'<i class="{"gone" if n in removed else ""}" style="height:{height:.1%}" title="block {n}: {score:.4g}"></i>'
        for n, score, height in zip(numbers, scores, heights, strict=True)
    )
    feet = "".join(f"<b>{n}</b>" for n in numbers)
    picture = f'<div role="img" aria-label="{escape(words)}">{cells}</div><small aria-hidden="true">{feet}</small>'
    return f'<figure class="st-bars"><figcaption>{escape(words)}</figcaption>{picture}</figure>'


def _height(score: float, finite: Sequence[float], wide: bool) -> float:
    """Share of the tallest bar's height."""
    if not math.isfinite(score) or not finite:
        return 1.0
    if wide:
        low, high = math.log(finite[0]), math.log(finite[-1])
        foot = low - 0.2 * (high - low)  # the smallest is a bar too
        return (math.log(score) - foot) / (high - foot)
    tallest = max(map(abs, finite))
    return abs(score) / tallest if tallest else 0.0


STYLE = """
.st-head h3 { margin: 0 0 .2em; border-left: .35em solid; padding-left: .5em; overflow-wrap: anywhere; }
.st-head p { margin: 0 0 .4em; font-size: .9em; opacity: .85; overflow-wrap: anywhere; }
.st-strip { display: flex; gap: 1px; height: 14px; }
.st-strip i { flex: 1; background: #475569; border-radius: 1px; min-width: 1px; }
.st-strip i.gone { background: transparent; box-shadow: inset 0 0 0 1px #94a3b8; }
.dark .st-strip i { background: #cbd5e1; }
.dark .st-strip i.gone { background: transparent; }
.st-error { color: #b91c1c; font-weight: 600; white-space: pre-wrap; }
.dark .st-error { color: #fca5a5; }
.st-measures { margin: 0; font-variant-numeric: tabular-nums; min-height: 1.5em; }
.st-quiet { opacity: .75; }
.st-chart { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
.st-chart caption { text-align: left; font-weight: 600; }
.st-chart th, .st-chart td { text-align: left; padding: .15em .5em; overflow-wrap: break-word; }
.st-chart td:last-child { text-align: right; }
.st-bar { width: 40%; }
.st-bar span { display: block; height: .9em; border-radius: 2px; min-width: 1px; }
.st-bars div { display: flex; align-items: flex-end; gap: 2px; height: 120px; border-bottom: 1px solid #94a3b8; }
.st-bars i { flex: 1; background: #475569; min-width: 1px; }
.dark .st-bars i { background: #cbd5e1; }
.st-bars div i.gone { background: #d97706; }
.dark .st-bars div i.gone { background: #f59e0b; }
.st-bars small { display: flex; gap: 2px; opacity: .75; }
.st-bars small b { flex: 1; font-weight: 400; text-align: center; min-width: 1px; overflow: hidden; }
.st-bars { margin: 0 0 1.5em; }
.st-table { overflow-x: auto; }
.st-table pre { font-size: .85em; }
footer { display: none !important; }
"""
