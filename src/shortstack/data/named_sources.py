"""`general=books.txt,code=src.jsonl`: texts with a name each, and the windows of all of them as one set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from shortstack.common.source_names import NAMED, SELF
from shortstack.data.calibration import CalibrationOptions, CalibrationSet, check_enough
from shortstack.data.marks import marks_of
from shortstack.data.preview import preview
from shortstack.errors import ShortstackError, UsageError


def named_sources(data: str) -> dict[str, str]:
    """Name -> source, of what `data` names; nothing where it is one source without a name.

    A file or folder of that very name is one source, whatever its name looks like.

    Raises:
        UsageError: a source without a name among named ones, two of one name, or a name without a source.
    """
    if NAMED.match(data) is None or Path(data).expanduser().exists():
        return {}
    found: dict[str, str] = {}
    for piece in data.split(","):
        match = NAMED.fullmatch(piece)
        if match is None:
            raise UsageError(
                f"--data {data!r}: {piece!r} has no name, but others have",
                hint="such as general=books.txt,code=src.jsonl",
            )
        name, source = match[1], match[2].strip()
        if name in found:
            raise UsageError(f"--data {data!r}: two sources have the name {name}", hint="name each source once")
        if not source:
            raise UsageError(
                f"--data {data!r}: {name} has no source", hint=f"{name}=FILE, a folder or a set on the hub"
            )
        found[name] = source
    return found


def calibration_tokens(values: Mapping[str, Any]) -> int:
    """How many tokens the windows of all sources hold, by options that were given; for estimates."""
    calibration = CalibrationOptions()
    texts = max(1, len(named_sources(str(values.get("data", calibration.data)))))
    return int(values.get("samples", calibration.samples) * values.get("seq_len", calibration.seq_len) * texts)


def joined_sets(calibration: CalibrationOptions, drawn: Mapping[str, CalibrationSet]) -> CalibrationSet:
    """The windows of named sources behind one another, which know their sources by name.

    Args:
        calibration: how they were drawn; `data` names them.
        drawn: the windows of each source.

    Raises:
        ShortstackError: they are not of one length, or none holds what an option is about.
    """
    data = calibration.data
    lengths = {name: len(one.windows[0]) for name, one in drawn.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{length} of {name}" for name, length in lengths.items())
        raise ShortstackError(
            f"--data {data}: windows must be of one length, found {listed} tokens",
            hint="set --seq-len to that of the rows of input_ids",
        )
    sets = list(drawn.values())
    of_rows = {"--chat-template": "chat_template", "--count-prompts": "counted"}
    for option, key in of_rows.items():
        if getattr(calibration, option[2:].replace("-", "_")) and not any(one.record.get(key) for one in sets):
            raise ShortstackError(f"--data {data}: no source has rows for {option}", hint="leave the option out")
    windows = [window for one in sets for window in one.windows]
    counted = None
    if any(one.counted is not None for one in sets):
        counted = [row for one in sets for row in one.counted or every_token(one.windows)]
    first = sets[0].record
    record: dict[str, Any] = {
        "source": data,
        "sha256": [one.record["sha256"] for one in sets],
        "samples": min(len(one.windows) for one in sets),
        "seq_len": first["seq_len"],
        **{key: first[key] for key in ("sampling", "seed", "bos_every", "chat_template") if key in first},
        **({"counted": "responses"} if counted is not None else {}),
        "sources": {name: one.record for name, one in drawn.items()},
        "marks": marks_of(windows),
    }
    return CalibrationSet(
        windows, record, tuple(name for name, one in drawn.items() for _ in one.windows), counted=counted
    )


def every_token(windows: Sequence[Sequence[int]]) -> list[list[bool]]:
    """All tokens count but the first of each window, which is never predicted."""
    return [[False, *[True] * (len(window) - 1)] for window in windows]


def preview_calibration(calibration: CalibrationOptions) -> list[str]:
    """Look at the text of each source before anything runs; lines about what could not be looked at.

    Raises:
        ShortstackError: a text that cannot be used, or cannot hold the windows.
    """
    notes, wanted = [], calibration.samples
    for source in (named_sources(calibration.data) or {"": calibration.data}).values():
        one = replace(calibration, data=source.removeprefix(SELF), samples=1 if source.startswith(SELF) else wanted)
        notes += preview(one.data, "calibration", lambda one=one: check_enough(one))  # type: ignore[misc]
    return notes
