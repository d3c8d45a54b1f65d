"""The rooms of the package, from the command line down to what knows no model, and a picture of them.

A room imports its own level and what lies below; tests/test_levels.py looks at every import.
"""

from __future__ import annotations

from html import escape

# From the top; each room with what a reader finds there.
LEVELS: tuple[tuple[tuple[str, str], ...], ...] = (
    (("cli", "the command line, made of the registry"),),
    (("recipes", "pipelines as data: stages and their parameters"),),
    (("registry", "a row per command: function, options, what it takes and makes"),),
    (
        ("scoring", "how much a block matters"),
        ("pruning", "plan, cut, repair, verify"),
        ("retraining", "train what is left"),
        ("quantization", "fewer bits"),
        ("evaluation", "what was lost"),
        ("benchmark", "speed and memory"),
        ("inspection", "is it sound?"),
        ("publishing", "card, report, export"),
        ("demo", "a page to try it"),
    ),
    (("engine", "run a model block by block"), ("data", "texts and rows, as windows and batches")),
    (("families", "the table of model families, and the probe of others"),),
    (("checkpoint", "config, headers, bytes, names"), ("baselines", "published orders and figures")),
    (("artifacts", "records between stages: scores, plan, results, provenance"),),
    (("runtime", "devices, memory, processes, outputs that appear whole or not at all"),),
    (("common", "formatting, options, JSON: no idea of a model"),),
)
# The probe of a family that the table does not know runs a tiny model of it.
UPWARDS = {("families", "engine")}

_WIDTH, _ROW, _GAP, _LINE = 930, 46, 12, 5
_STYLE = (
    ".b{fill:#eceff1;stroke:#546e7a}.t{fill:#263238;text-anchor:middle;font-weight:600}"
    ".s{fill:#455a64;text-anchor:middle;font-size:12px}.a{stroke:#78909c;stroke-width:1.5}"
)


def level_of() -> dict[str, int]:
    """The level of each room, 0 at the top."""
    return {room: number for number, level in enumerate(LEVELS) for room, _ in level}


def picture() -> str:
    """The levels as SVG, a row or more each."""
    parts, y = [], 4.0
    for level in LEVELS:
        rows = [level[start : start + _LINE] for start in range(0, len(level), _LINE)]
        if y > 4:
            parts.append(f'<path class="a" d="M{_WIDTH / 2} {y - _GAP}v{_GAP}"/>')
        for row in rows:
            width = (_WIDTH - 8 - 6 * (len(row) - 1)) / len(row)
            for number, (room, what) in enumerate(row):
                x = 4 + number * (width + 6)
                middle = x + width / 2
                parts.append(
                    f'<rect class="b" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{_ROW}" rx="5"/>'
                    f'<text class="t" x="{middle:.1f}" y="{y + 19:.1f}">{escape(room)}</text>'
                    f'<text class="s" x="{middle:.1f}" y="{y + 36:.1f}">{escape(what)}</text>'
                )
            y += _ROW + 6
        y += _GAP - 6
    words = "; ".join(", ".join(room for room, _ in level) for level in LEVELS)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y - _GAP + 4:.0f}" '
        f'font-family="system-ui, sans-serif" font-size="14" role="img" aria-label="rooms, from the top: {words}">\n'
        f"<style>{_STYLE}</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )
