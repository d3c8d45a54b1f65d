"""Plain-text tables, bars and units for the terminal."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import PurePath

from shortstack.errors import UsageError

_NARROWEST = 80  # columns that every table fits into


def plain(text: str) -> str:
    """A message without control characters (a tensor's name may hold terminal escapes) and without secrets."""
    text = re.sub(r"\b(hf_)[A-Za-z0-9]{8,}", r"\1***", text)
    text = re.sub(r"(https?://)[^/\s:@]+:[^/\s@]+@", r"\1***@", text)
    return re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", text)


def terminal_width() -> int:
    """Columns of the terminal, at least 80; 80 where there is none."""
    return max(_NARROWEST, shutil.get_terminal_size((_NARROWEST, 24)).columns)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], keys: int = 1) -> str:
    """Columns under their headings; the first is left-aligned, figures are right-aligned.

    Columns that do not fit beside one another stand below, after the first `keys` columns again: those name the row.
    """
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    named = list(range(keys))
    naming = sum(widths[:keys]) + 2 * (keys - 1)
    room, parts, used = terminal_width(), [named], naming
    for column in range(keys, len(header)):
        if used + 2 + widths[column] > room and len(parts[-1]) > keys:
            parts, used = [*parts, named], naming
        parts[-1] = [*parts[-1], column]
        used += 2 + widths[column]

    def line(row: Sequence[str], columns: Sequence[int]) -> str:
        cells = [row[column].rjust(widths[column]) if column else row[0].ljust(widths[0]) for column in columns]
        return "  ".join(cells).rstrip()

    lines = [header, ["-" * width for width in widths], *rows]
    return "\n\n".join("\n".join(line(row, columns) for row in lines) for columns in parts)


def short_names(names: Sequence[str]) -> list[str]:
    """Paths by as many of their last parts as tell them apart; what is no path stays as it is."""
    parts = {name: PurePath(name).parts for name in names}
    taken = 1
    short: dict[str, str] = {}
    while taken <= max(map(len, parts.values()), default=0):
        short = {name: "/".join(of[-taken:]) if "/" in name else name for name, of in parts.items()}
        if len(set(short.values())) == len(short):
            break
        taken += 1
    return [short.get(name, name) for name in names]


def legend(names: Sequence[str]) -> list[str]:
    """A line for each name that is shown shortened."""
    pairs = dict(zip(names, short_names(names), strict=True))
    return [f"{short}: {name}" for name, short in pairs.items() if short != name]


def wrapped(
    pairs: Iterable[tuple[str, str]], *, indent: int = 0, most: int | None = None, width: int | None = None
) -> str:
    """Names, with a text beside each that is wrapped at the width of the terminal.

    Args:
        pairs: a name and its text.
        indent: columns before each name.
        most: columns that names may take; the text of a longer one begins on the next line.
        width: columns of a line; by default those of the terminal.
    """
    listed = list(pairs)
    fitting = [len(name) for name, _ in listed if most is None or len(name) <= most]
    column = indent + max(fitting, default=most or 0) + 2
    room = max(_NARROWEST // 3, (width or terminal_width()) - column)
    lines: list[str] = []
    for name, text in listed:
        parts = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False) or [""]
        start = " " * indent + name
        if len(start) + 2 > column:
            lines.append(start)
            start = ""
        lines += [f"{start:{column}}{parts[0]}".rstrip(), *(" " * column + part for part in parts[1:])]
    return "\n".join(lines)


def aligned_left(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of words: every column is left-aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [header, *rows]]
    return table(padded[0], padded[1:])


def bar(share: float, width: int = 28) -> str:
    """A bar of `share` (0 to 1) of `width` characters, in eighths of a character."""
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    full, rest = divmod(eighths, 8)
    return "█" * full + ("▏▎▍▌▋▊▉"[rest - 1] if rest else "")


def count(number: int) -> str:
    """A number of parameters, short and exact to three digits: 6.74B, 2.62M, 260k."""
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}" if number < 1000 * size else f"{number / size:.0f}{unit}"
    return str(number)


def size(number: int) -> str:
    """A number of bytes in decimal units: 13.5 GB, 5.25 MB, 512 kB."""
    for size, unit in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 1000 * size else f"{number / size:.0f} {unit}"
    return f"{number} B"


def counted(number: int, noun: str) -> str:
    """A number with what it counts: `1 block`, `2 blocks`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def named_blocks(numbers: Sequence[int]) -> str:
    """Blocks by number: `block 2`, `blocks 2-4, 7`."""
    return f"block{'' if len(numbers) == 1 else 's'} {ranges(numbers)}"


def ranges(numbers: Iterable[int]) -> str:
    """Whole numbers as a person writes them: `0-3, 7, 9-10`."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in parts)


def parse_blocks(text: str) -> list[int]:
    """`3,7-9` -> [3, 7, 8, 9]. Duplicates are kept, for the plan to refuse."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", part)
        if not match:
            raise UsageError(
                f"--blocks {text!r}: {part.strip()!r} is not a block number", hint="such as --blocks 3,7-9"
            )
        first, last = int(match.group(1)), int(match.group(2) or match.group(1))
        if last < first:
            raise UsageError(f"--blocks {text!r}: the range {part.strip()!r} runs backwards", hint=f"{last}-{first}?")
        found.extend(range(first, last + 1))
    return found


def parse_size(text: str, option: str = "") -> int:
    """`4GB`, `500 MB`, `1.5T` or `2000000` -> bytes, in decimal units.

    Raises:
        UsageError: it is no size.
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{0,9})?)\s*([kKmMgGtT]?)[bB]?\s*", text)
    if not match:
        raise UsageError(f"{option} {text!r} is not a size".lstrip(), hint="such as 4GB, 500MB or 2000000")
    return round(float(match.group(1)) * 1000.0 ** " kmgt".index(match.group(2).lower() or " "))


def seconds(duration: float) -> str:
    """A duration: 0.42 s, 37 s, 2 min 5 s."""
    if duration < 10:
        return f"{duration:.2f} s"
    if duration < 120:
        return f"{duration:.0f} s"
    return f"{int(duration // 60)} min {int(duration % 60)} s"
