"""Plain-text tables, bars and units for the terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from shortstack.errors import UsageError


def plain(text: str) -> str:
    """A message without control characters (a tensor's name may hold terminal escapes) and without secrets."""
    text = re.sub(r"\b(hf_)[A-Za-z0-9]{8,}", r"\1***", text)
    text = re.sub(r"(https?://)[^/\s:@]+:[^/\s@]+@", r"\1***@", text)
    return re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", text)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns under their headings; the first is left-aligned, figures are right-aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *(line(row) for row in rows)])


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


def ranges(numbers: Iterable[int]) -> str:
    """Whole numbers as a person writes them: `0-3, 7, 9-10`."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in parts)


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
